"""The inference ops against their references: all weight types, odd sizes, results that do not depend on the batch; on a CPU in each
of its ways, by the CUDA ops' own sources, emulated, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_samoe.inference.decode_layers import make_decode_model
from megatron_samoe.inference.serving import Serving
from megatron_samoe.inference.single_runner import SingleRunner
from megatron_samoe.ops import cpu_products, decode, decode_reference, extension
from megatron_samoe.ops.decode import Routed, stored
from megatron_samoe.ops.decode_parts import PAGE, Places, Routing, Weight
from megatron_samoe.ops.topk_gate import ChoiceRule
from tests.harness.devices import CPU, EMULATED, GPU, on, running_on, skip_without
from tests.harness.op_checks import make_attention, make_experts, make_norm, moved, normal, threads_of_torch
from tests.harness.pairs import by_pairs
from tests.unit.inference.test_runners import IDS, close, make, tables
from tests.unit.inference.tiny_models import forward_logits, step_logits

pytestmark = pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")
KINDS = ("fp32", "bf16", "int8")
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
CPU_WAYS = ("streamed", "fp32", "native", "blas")


@pytest.fixture(params=[*CPU_WAYS, EMULATED, GPU])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """On a CPU weights are streamed, or any number of tokens takes whole products, in this way with weights in bf16."""
    way = request.param
    possible = cpu_products.possible(cpu_products.this_processor(), torch.ops.megatron_samoe.has_bf16_product())
    if way in (EMULATED, "cuda"):
        with running_on(way, request, monkeypatch):
            yield way
    elif way == "streamed":
        with cpu_products.using(fp32_tokens=2**62, bf16_tokens=2**62):
            yield way
    elif way in possible:
        with cpu_products.using(fp32_tokens=1, bf16_tokens=1, bf16=way):
            yield way
    else:
        pytest.skip("this processor has no dot products of bf16")


def device_of(way: str) -> str:
    return "cuda" if way == "cuda" else "cpu"


def rounds(kind: str, way: str) -> bool:
    return kind == "bf16" and way in ("native", "blas")


def tolerance(kind: str, way: str) -> dict[str, float]:
    """Of sums of operands that are rounded as `way` rounds them; the BLAS rounds the sum as well."""
    return {"rtol": 2**-8, "atol": 2**-4} if kind == "bf16" and way == "blas" else TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens, inputs, outputs", [(1, 64, 64), (3, 37, 11), (7, 100, 530), (301, 24, 9), (0, 8, 8)])
def test_linear(way, kind, tokens, inputs, outputs):
    weight, bias, x = stored(normal(1, outputs, inputs), kind), normal(2, outputs), normal(3, tokens, inputs)
    out, allowed = normal(4, tokens, outputs), tolerance(kind, way)
    exact = (x.bfloat16() if rounds(kind, way) else x).double() @ weight.dequantized().double().t()
    there = moved((x, weight, bias, out), device_of(way))
    for b, accumulate, expected in (
        (None, False, exact),
        (bias, False, exact + bias),
        (bias, True, exact + bias + out),
    ):
        found = decode.linear(*there[:2], None if b is None else there[2], there[3].clone(), accumulate)
        torch.testing.assert_close(found.cpu(), expected.float(), **allowed)


@pytest.mark.parametrize("kind", KINDS)
def test_long_rows_on_two_threads(way, kind):
    weight = stored(normal(1, 300, 2048) * 2048**-0.5, kind)
    x = normal(2, 5, 2048) * torch.logspace(-4, 4, 5)[:, None]
    there = moved((x, weight), device_of(way))
    with threads_of_torch(2):
        out = decode.linear(*there, None, torch.empty(5, 300, device=there[0].device)).cpu()
    # Every row to the precision of its own numbers.
    exact = (x.bfloat16() if rounds(kind, way) else x).double() @ weight.dequantized().double().t()
    bound = 2**-8 if rounds(kind, way) and way == "blas" else 3e-6
    assert ((out - exact).abs().amax(1) < bound * x.abs().amax(1)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", [384, 515, 1100, 4096])
def test_few_tokens_of_long_rows(kind, inputs):
    """One to nine tokens, which read weights as a stream or as tiles: right, and of the same bits in every number."""
    weight, x = stored(normal(1, 70, inputs) * inputs**-0.5, kind), normal(2, 9, inputs)
    exact = (x.double() @ weight.dequantized().double().t()).float()
    with cpu_products.using(fp32_tokens=2**62, bf16_tokens=2**62):
        together = decode.linear(x, weight, None, torch.empty(9, 70))
        torch.testing.assert_close(together, exact, **TOLERANCE)
        for first, last in ((0, 1), (1, 3), (3, 6), (5, 9), (2, 7)):
            some = decode.linear(x[first:last], weight, None, torch.empty(last - first, 70))
            assert torch.equal(some, together[first:last])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_shows(kind, bad):
    x = normal(1, 3, 70)
    x[1, 66] = bad
    out = decode.linear(x, stored(normal(2, 9, 70), kind), None, torch.empty(3, 9))
    assert out[[0, 2]].isfinite().all() and not out[1].isfinite().any()


@on(CPU, EMULATED, GPU)
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("tokens, size", [(9, 5), (7, 64), (9, 131), (3, 300), (33, 1000), (0, 8)])
def test_norm(device, rms, tokens, size):
    x, parameters = normal(1, tokens, size) + 3, make_norm(size, rms, not rms)
    expected = decode_reference.norm(x, parameters)
    there = moved((x, parameters), device)
    torch.testing.assert_close(decode.norm(*there, torch.empty_like(there[0])).cpu(), expected, **TOLERANCE)


#: Key-value heads, queries of each, width of a head, and length of the first sequence.
HEADS = ((2, 1, 64, 7), (3, 2, 20, 33), (1, 4, 128, 19), (2, 5, 16, 17), (1, 2, 256, 40))


@on(CPU, EMULATED, GPU)
@pytest.mark.parametrize(
    ("heads", "kind", "style"), [*by_pairs(HEADS, KINDS, ("plain", "gpt", "rope")), ((1, 2, 32, 270), "fp32", "plain")]
)
def test_attention_block(device: str, heads: tuple[int, int, int, int], kind: str, style: str) -> None:
    """Of two sequences: prompts, then a token of each, then a token and a part of a prompt."""
    groups, queries, head_dim, length = heads
    hidden, cache = 48, torch.bfloat16 if kind == "bf16" else torch.float32
    per_slot = -(-(length + 2) // PAGE) + 2
    pages = torch.randperm(2 * per_slot, generator=torch.Generator().manual_seed(1)).view(2, per_slot).int()
    angles = normal(11, per_slot * PAGE, head_dim // 4 * 2)
    rotary = (angles.cos(), angles.sin()) if style == "rope" else (None, None)
    slow = make_attention(hidden, groups, queries, head_dim, kind, style, cache, 2 * per_slot)
    fast = moved(slow, device)
    room = 4 * decode.attention_scratch(length + 6, fast)
    steps = [
        ([*range(length), *range(5)], [0] * length + [1] * 5),
        ([length, 5], [0, 1]),
        ([length + 1, *range(6, 36)], [0] + [1] * 30),
    ]
    for number, (positions, slots) in enumerate(steps):
        places = Places(*(torch.tensor(v, dtype=torch.int32) for v in (positions, slots)), pages, *rotary)
        x = normal(20 + number, len(positions), hidden)
        attended = decode_reference.attention(x, slow, places)
        expected = x + decode_reference.linear(attended, slow.output, slow.output_bias)
        found = []
        # With scratch for the step alone, and with more for long sequences in parts: the same bits.
        for scratch in (decode.attention_scratch(len(positions), fast), max(room, 4 * len(positions) * hidden)):
            found.append(moved(x, device))
            decode.attention_block(found[-1], fast, moved(places, device), torch.empty(scratch, device=device))
        assert torch.equal(*found)
        rounding = {"rtol": 2e-2, "atol": 5e-3} if kind == "bf16" else TOLERANCE
        torch.testing.assert_close(found[0].cpu(), expected, **rounding)
        for ours, theirs in ((fast.keys, slow.keys), (fast.values, slow.values)):
            torch.testing.assert_close(ours.cpu().float(), theirs.float(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "tokens, experts, topk, ffn", [(4, 4, 2, 587), (33, 5, 2, 75), (7, 9, 8, 75), (230, 3, 1, 75), (6, 1, 0, 75)]
)
def test_mlp_block(way, kind, gated, tokens, experts, topk, ffn):
    """Experts, or for topk 0 an MLP without a router: whole, and in parts, which give the same bits."""
    hidden, device = 36, device_of(way)
    stack, norm = (
        make_experts(hidden, ffn, experts + 2, experts, kind, gated, not gated),
        make_norm(hidden, gated, not gated),
    )
    rule = ChoiceRule(topk, "softmax" if gated else "sigmoid", gated)
    routing, x = Routing(normal(12, experts, hidden), rule) if topk else None, normal(13, tokens, hidden)
    normed = decode_reference.norm(x, norm)
    ids_TK, probs_TK = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
    if routing is not None:
        ids_TK, probs_TK, _ = decode_reference.choose(normed, routing)
    y_TKH = torch.empty(*ids_TK.shape, hidden)
    decode_reference.experts(normed, ids_TK, stack, y_TKH)

    there_stack, there_norm, there_routing, there_x = moved((stack, norm, routing, x), device)
    scratch = torch.empty(decode.mlp_scratch(tokens, hidden, ffn, max(topk, 1), experts), device=device)
    whole = there_x.clone()
    decode.mlp_block(whole, there_norm, there_routing, there_stack, scratch)
    # Inputs of both products are rounded, which tests of one product know exactly.
    allowed = {"rtol": 2**-6, "atol": 2**-6} if rounds(kind, way) else {"rtol": 5e-5, "atol": 5e-5}
    torch.testing.assert_close(whole.cpu(), x + (y_TKH * probs_TK[..., None]).sum(1), **allowed)

    routed = moved(Routed(torch.empty(tokens, hidden), torch.empty_like(ids_TK), torch.empty_like(probs_TK)), device)
    decode.route(there_x, there_norm, there_routing, routed, scratch)
    assert torch.equal(routed.ids_TK.cpu(), ids_TK)
    torch.testing.assert_close(routed.probs_TK.cpu(), probs_TK, **TOLERANCE)
    y_TKH = torch.full(y_TKH.shape, torch.nan, device=device)
    first_E = torch.arange(experts) % 2 == 0
    for last, kept_E in ((False, first_E), (True, ~first_E)):
        index = [torch.where(kept_E, index_E, -1).to(device) for index_E in (stack.index1_E, stack.index2_E)]
        some = replace(there_stack, index1_E=index[0], index2_E=index[1])
        decode.experts_block(routed, some, y_TKH, there_x, scratch, combine=last)
    assert torch.equal(there_x, whole)


@pytest.mark.parametrize("way", CPU_WAYS, indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_on_more_threads(way, kind):
    """Among them one that has most tokens, which threads share."""
    hidden, ffn, tokens, experts = 36, 75, 400, 5
    stack, norm = make_experts(hidden, ffn, experts, experts, kind, True, False), make_norm(hidden, True, False)
    router = normal(12, experts, hidden) * torch.tensor([9.0, 1, 1, 1, 1])[:, None]
    scratch, found = torch.empty(decode.mlp_scratch(tokens, hidden, ffn, 2, experts)), []
    for threads in (1, 3):
        with threads_of_torch(threads):
            found.append(normal(13, tokens, hidden))
            decode.mlp_block(found[-1], norm, Routing(router, ChoiceRule(2)), stack, scratch)
    if way == "streamed" or kind == "int8" or (way, kind) == ("native", "bf16"):
        assert torch.equal(*found)
    else:
        torch.testing.assert_close(*found, **tolerance(kind, way))


@pytest.mark.parametrize("way", ["streamed", EMULATED, GPU], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_has_the_same_bits_in_any_streamed_batch(way, kind):
    hidden, ffn, experts, device = 52, 68, 4, device_of(way)
    stack, norm = make_experts(hidden, ffn, experts, experts, kind, True, False), make_norm(hidden, True, False)
    routing, x = Routing(normal(16, experts, hidden), ChoiceRule(2, pre_softmax=True)), normal(17, 150, hidden)
    layer = make_attention(hidden, 2, 2, 13, kind, "rope", torch.float32, 1)
    norm, routing, stack, output, x = moved((norm, routing, stack, layer.output, x), device)

    def block(rows: Tensor) -> Tensor:
        out = rows.clone()
        scratch = torch.empty(decode.mlp_scratch(len(rows), hidden, ffn, 2, experts), device=device)
        decode.mlp_block(out, norm, routing, stack, scratch)
        return decode.linear(out, output, None, torch.empty_like(out))

    together = block(x)
    for rows in (slice(0, 1), slice(7, 9), slice(20, 33), slice(40, 150)):
        assert torch.equal(block(x[rows].contiguous()), together[rows])


@on(CPU, EMULATED, GPU)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coefficients", [[0.5, -1.25, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0]])
@pytest.mark.parametrize("rows, cols", [(7, 44), (7, 45), (64, 512)])
def test_combine_rows(device, kind, coefficients, rows, cols):
    """A bank with a coefficient of 0 is not read."""
    banks = [stored(normal(seed, rows, cols), kind) for seed in range(len(coefficients))]
    exact = torch.zeros(rows, cols)
    for bank, c in zip(banks, coefficients, strict=True):
        if c:
            exact += bank.dequantized() * c
        elif kind != "int8":
            bank.data.fill_(torch.nan)
    out = moved(Weight(torch.empty_like(banks[0].data), torch.empty(rows) if kind == "int8" else None), device)
    decode.combine_rows(list(moved(tuple(banks), device)), torch.tensor(coefficients, device=device), out)
    if out.scale is not None:
        assert ((out.dequantized() - exact.to(device)).abs() <= out.scale[:, None] * 0.501 + 1e-6).all()
    else:
        rtol = 1e-6 if kind == "fp32" else 8e-3
        torch.testing.assert_close(out.data.cpu(), exact.to(out.data.dtype), rtol=rtol, atol=1e-6)


@on(CPU, EMULATED, GPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_of_weights(device, dtype):
    weight = normal(1, 3, 5, 77).to(dtype)
    weight[1, 2], weight[2, 3, 70], weight[2, 4, 3] = 0, torch.nan, torch.inf
    x = weight.float().numpy()
    largest = np.abs(x).max(-1, keepdims=True)
    factor = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    made = stored(weight.to(device), "int8")
    for row in np.ndindex(3, 5):
        if np.isfinite(largest[row]):
            np.testing.assert_array_equal(made.data[row].cpu(), np.rint(x[row] * factor[row]))
            assert made.scale[row].item() == largest[row] / np.float32(127)
        else:
            assert made.scale[row].isnan()


@pytest.mark.parametrize(
    ("name", "serving"),
    [("dense gpt3", "folded"), ("moe shared", "folded"), ("samoe gpt3", "on-the-fly"), ("samoe llama", "selected")],
)
@pytest.mark.parametrize("kind", [EMULATED, GPU])
def test_a_models_logits(
    name: str, serving: Serving, kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, parts and single tokens of two sequences, as the training forward has them."""
    skip_without(kind)
    loaded, ids = make(name, serving), IDS[1:]
    expected = [forward_logits(loaded, row) for row in ids]
    pages = tables([len(row) for row in ids])
    model = make_decode_model(loaded.model, serving, "fp32", pages.num_pages)
    runner = SingleRunner(moved(model, device_of(kind)), 64, 64, 4)
    runner._plan = None  # the CPU's alone
    pages.table = pages.table.to(runner.device)
    with running_on(kind, request, monkeypatch), torch.profiler.profile() as profile:
        for step in ([(0, 0, 3), (1, 0, 17)], [(0, 3, 1), (1, 17, 2)], [(1, 19, 1), (0, 4, 1)]):
            got = step_logits(runner, pages, [(slot, first, ids[slot][first : first + n]) for slot, first, n in step])
            for (slot, first, n), logits in zip(step, got, strict=True):
                close(logits, expected[slot][first : first + n], 1e-4 if kind == "cuda" else 1e-5)
    seen = {event.key.rpartition("::")[2] for event in profile.key_averages()}
    experts = "decode_moe_block" if name == "dense gpt3" or serving == "selected" else "decode_experts"
    assert {"decode_linear", "decode_norm", "decode_attention_block", experts} <= seen


@on(GPU)
def test_a_block_in_a_cuda_graph(device: str) -> None:
    """Nothing in it allocates or waits, so it can be captured; replayed, it takes what lies in its buffers then."""
    hidden, ffn, experts = 64, 96, 8
    parts = (make_experts(hidden, ffn, experts, experts, "bf16", True, False), make_norm(hidden, True, False))
    stack, norm = moved(parts, device)
    routing = Routing(normal(12, experts, hidden).to(device), ChoiceRule(2))
    scratch = torch.empty(decode.mlp_scratch(4, hidden, ffn, 2, experts), device=device)
    x, inputs = torch.zeros(4, hidden, device=device), normal(1, 4, hidden).to(device)
    decode.mlp_block(x, norm, routing, stack, scratch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode.mlp_block(x, norm, routing, stack, scratch)
    x.copy_(inputs)
    graph.replay()
    decode.mlp_block(inputs, norm, routing, stack, scratch)
    assert torch.equal(x, inputs)


def test_what_a_gpus_kernels_are_too_narrow_for(emulated: Any) -> None:
    wide, bank = make_attention(8, 1, 1, 260, "fp32", "plain", torch.float32, 2), stored(normal(1, 3, 8), "fp32")
    zeros = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="a head of 260, of at most 256"):
        decode.attention_block(normal(1, 2, 8), wide, Places(zeros, zeros, zeros[None]), torch.empty(9999))
    with pytest.raises(RuntimeError, match="65 banks, of at most 64 on a GPU"):
        decode.combine_rows([bank] * 65, torch.ones(65), bank)


def test_quantized_rows_keep_their_largest_magnitude():
    weight = normal(1, 6, 40)
    weight[2] = 0
    small = decode_reference.quantize(weight)
    torch.testing.assert_close(small.dequantized().abs().amax(-1), weight.abs().amax(-1))
    assert (small.dequantized() - weight).abs().max() <= weight.abs().max() / 127 * 0.501


@pytest.mark.night
@pytest.mark.parametrize("instruction_set", ["portable", "avx2"])
def test_lesser_instruction_sets(instruction_set):
    if os.environ.get("MEGATRON_SAMOE_ISA") or instruction_set not in extension.build_info()["instruction_sets"]:
        pytest.skip("within such a run, or not in this build")
    plans = Path(__file__).parents[1] / "inference" / "test_plan.py"
    options = "-m pytest -q -p no:cacheprovider -k".split()
    command = [sys.executable, *options, "not emulated", __file__, str(plans)]
    environment = {**os.environ, "MEGATRON_SAMOE_ISA": instruction_set}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:]
