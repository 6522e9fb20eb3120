"""The inference ops against their twins: all weight types, odd sizes, and results that do not depend on the batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_samoe.ops import cpu_products, decode, decode_reference, extension
from megatron_samoe.ops.decode import stored
from megatron_samoe.ops.decode_parts import PAGE, AttentionLayer, ExpertStack, Norm, Places, Routing, Weight
from megatron_samoe.ops.topk_gate import ChoiceRule
from tests.harness.extension_off import without_extension
from tests.harness.op_checks import threads_of_torch

pytestmark = pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")
TYPES = ("fp32", "bf16", "int8")
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def twin(monkeypatch: pytest.MonkeyPatch) -> None:
    without_extension(monkeypatch)


def make_norm(size: int, rms: bool, bias: bool) -> Norm:
    return Norm(1 + 0.1 * normal(1, size), normal(2, size) if bias else None, 1e-5, rms)


def make_experts(hidden: int, ffn: int, matrices: int, experts: int, kind: str, gated: bool, bias: bool) -> ExpertStack:
    up = (2, ffn) if gated else (ffn,)
    generator = torch.Generator().manual_seed(5)
    return ExpertStack(
        stored(normal(3, matrices, *up, hidden) * hidden**-0.5, kind),
        stored(normal(4, matrices, hidden, ffn) * ffn**-0.5, kind),
        normal(5, matrices, *up) if bias else None,
        normal(6, matrices, hidden) if bias else None,
        gated,
        torch.randint(matrices, (experts,), generator=generator),
        torch.randint(matrices, (experts,), generator=generator),
        *((normal(7, experts), normal(8, experts)) if gated else ()),
    )


def make_attention(
    hidden: int, groups: int, queries: int, head_dim: int, kind: str, style: str, cache: torch.dtype, pages: int
) -> AttentionLayer:
    gpt = style == "gpt"
    head_norm = make_norm(head_dim, not gpt, gpt)
    return AttentionLayer(
        make_norm(hidden, not gpt, gpt),
        stored(normal(7, groups, queries + 2, head_dim, hidden) * hidden**-0.5, kind),
        normal(8, groups, queries + 2, head_dim) if gpt else None,
        None if style == "plain" else (head_norm, head_norm),
        stored(normal(9, hidden, groups * queries * head_dim) * hidden**-0.5, kind),
        normal(10, hidden) if gpt else None,
        torch.zeros(pages, groups, head_dim, PAGE, dtype=cache),
        torch.zeros(pages, groups, PAGE, head_dim, dtype=cache),
    )


@pytest.fixture(params=["streamed", "fp32", "native", "blas"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Weights are streamed, or any number of tokens takes whole products, in this way with weights in bf16."""
    if request.param == "streamed":
        with cpu_products.using(fp32_tokens=2**62, bf16_tokens=2**62):
            yield request.param
        return
    if request.param not in cpu_products.possible(
        cpu_products.this_processor(), torch.ops.megatron_samoe.has_bf16_product()
    ):
        pytest.skip("this processor has no dot products of bf16")
    with cpu_products.using(fp32_tokens=1, bf16_tokens=1, bf16=request.param):
        yield request.param


def rounds(kind: str, way: str) -> bool:
    return kind == "bf16" and way in ("native", "blas")


def tolerance(kind: str, way: str) -> dict[str, float]:
    """Of sums of operands that are rounded as `way` rounds them; the BLAS rounds the sum as well."""
    return {"rtol": 2**-8, "atol": 2**-4} if kind == "bf16" and way == "blas" else TOLERANCE


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens, inputs, outputs", [(1, 64, 64), (3, 37, 11), (7, 100, 530), (301, 24, 9), (0, 8, 8)])
def test_linear(way, kind, tokens, inputs, outputs):
    weight, bias, x = stored(normal(1, outputs, inputs), kind), normal(2, outputs), normal(3, tokens, inputs)
    out = normal(4, tokens, outputs)
    seen = x.bfloat16() if rounds(kind, way) else x
    exact = seen.double() @ weight.dequantized().double().t()
    allowed = tolerance(kind, way)
    torch.testing.assert_close(decode.linear(x, weight, None, out.clone()), exact.float(), **allowed)
    torch.testing.assert_close(decode.linear(x, weight, bias, out.clone()), (exact + bias).float(), **allowed)
    added = decode.linear(x, weight, bias, out.clone(), accumulate=True)
    torch.testing.assert_close(added, (exact + bias + out).float(), **allowed)


@pytest.mark.parametrize("kind", TYPES)
def test_long_rows_on_two_threads(way, kind):
    weight = stored(normal(1, 300, 2048) * 2048**-0.5, kind)
    x = normal(2, 5, 2048) * torch.logspace(-4, 4, 5)[:, None]
    with threads_of_torch(2):
        out = decode.linear(x, weight, None, torch.empty(5, 300))
    # Every row to the precision of its own numbers.
    exact = (x.bfloat16() if rounds(kind, way) else x).double() @ weight.dequantized().double().t()
    bound = 2**-8 if rounds(kind, way) and way == "blas" else 3e-6
    assert ((out - exact).abs().amax(1) < bound * x.abs().amax(1)).all()


@pytest.mark.parametrize("kind", TYPES)
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


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_shows(kind, bad):
    x = normal(1, 3, 70)
    x[1, 66] = bad
    out = decode.linear(x, stored(normal(2, 9, 70), kind), None, torch.empty(3, 9))
    assert out[[0, 2]].isfinite().all() and not out[1].isfinite().any()


@pytest.mark.parametrize("rms, bias", [(True, False), (False, True)])
@pytest.mark.parametrize("size", [5, 64, 131])
def test_norm(rms, bias, size):
    x, parameters = normal(1, 9, size) + 3, make_norm(size, rms, bias)
    expected = decode_reference.norm(x, parameters)
    torch.testing.assert_close(decode.norm(x, parameters, torch.empty_like(x)), expected, **TOLERANCE)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("style", ["plain", "gpt", "rope"])
@pytest.mark.parametrize("groups, queries, head_dim", [(2, 1, 64), (3, 2, 20), (1, 4, 128)])
def test_attention_block(monkeypatch, kind, style, groups, queries, head_dim):
    hidden, cache = 48, torch.bfloat16 if kind == "bf16" else torch.float32
    pages = torch.tensor([[4, 0, 2], [5, 1, 3]], dtype=torch.int32)
    angles = normal(11, 48, head_dim // 4 * 2)
    tables = (angles.cos(), angles.sin()) if style == "rope" else (None, None)
    layers = [make_attention(hidden, groups, queries, head_dim, kind, style, cache, 6) for _ in range(2)]
    # Two prompts of unequal length, then a token of each, then a token and a second part of a prompt.
    steps = [
        ([*range(19), *range(5)], [0] * 19 + [1] * 5),
        ([19, 5], [0, 1]),
        ([20, *range(6, 40)], [0] + [1] * 34),
    ]
    for number, (positions, slots) in enumerate(steps):
        places = Places(*(torch.tensor(v, dtype=torch.int32) for v in (positions, slots)), pages, *tables)
        x = normal(20 + number, len(positions), hidden)
        scratch = torch.empty(decode.attention_scratch(len(positions), layers[0]))
        fast, slow = x.clone(), x.clone()
        decode.attention_block(fast, layers[0], places, scratch)
        with monkeypatch.context() as patch:
            twin(patch)
            decode.attention_block(slow, layers[1], places, scratch)
        torch.testing.assert_close(
            fast, slow, **(TOLERANCE if cache == torch.float32 else {"rtol": 2e-2, "atol": 5e-3})
        )
        torch.testing.assert_close(layers[0].keys.float(), layers[1].keys.float(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("gated, bias", [(True, False), (False, True)])
@pytest.mark.parametrize("tokens, experts, topk", [(1, 4, 2), (33, 5, 2), (230, 3, 1), (6, 1, 0)])
def test_mlp_block(way, monkeypatch, kind, gated, bias, tokens, experts, topk):
    hidden, ffn = 36, 75
    stack = make_experts(hidden, ffn, experts + 2, experts, kind, gated, bias)
    routing = Routing(normal(12, experts, hidden), ChoiceRule(topk)) if topk else None
    x, norm = normal(13, tokens, hidden), make_norm(hidden, gated, bias)
    scratch = torch.empty(decode.mlp_scratch(tokens, hidden, ffn, max(topk, 1), experts))
    fast, slow = x.clone(), x.clone()
    decode.mlp_block(fast, norm, routing, stack, scratch)
    with monkeypatch.context() as patch:
        twin(patch)
        decode.mlp_block(slow, norm, routing, stack, scratch)
    assert not torch.equal(fast, x)
    # Inputs of both products are rounded, which tests of one product know exactly.
    allowed = {"rtol": 2**-6, "atol": 2**-6} if rounds(kind, way) else TOLERANCE
    torch.testing.assert_close(fast, slow, **allowed)


@pytest.mark.parametrize("kind", TYPES)
def test_experts_on_more_threads(way, kind):
    """Among them one that has most tokens, which threads share."""
    hidden, ffn, tokens, experts = 36, 75, 400, 5
    stack, norm = make_experts(hidden, ffn, experts, experts, kind, True, False), make_norm(hidden, True, False)
    router = normal(12, experts, hidden) * torch.tensor([9.0, 1, 1, 1, 1])[:, None]
    x, found = normal(13, tokens, hidden), []
    for threads in (1, 3):
        with threads_of_torch(threads):
            found.append(x.clone())
            scratch = torch.empty(decode.mlp_scratch(tokens, hidden, ffn, 2, experts))
            decode.mlp_block(found[-1], norm, Routing(router, ChoiceRule(2)), stack, scratch)
    if way == "streamed" or kind == "int8" or (way, kind) == ("native", "bf16"):
        assert torch.equal(*found)
    else:
        torch.testing.assert_close(*found, **tolerance(kind, way))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", TYPES)
def test_experts_in_parts_give_the_same_bits(kind):
    hidden, ffn, tokens, experts, topk = 40, 52, 41, 6, 2  # enough for products of any type
    stack = make_experts(hidden, ffn, experts, experts, kind, True, False)
    own = torch.arange(experts)
    stack = replace(stack, index1_E=own, index2_E=own)
    norm, x = make_norm(hidden, True, False), normal(14, tokens, hidden)
    routing = Routing(normal(15, experts, hidden), ChoiceRule(topk, "sigmoid"))
    scratch = torch.empty(decode.mlp_scratch(tokens, hidden, ffn, topk, experts))
    whole = x.clone()
    decode.mlp_block(whole, norm, routing, stack, scratch)
    routed = decode.Routed(torch.empty_like(x), torch.empty(tokens, topk, dtype=torch.int64), torch.empty(tokens, topk))
    decode.route(x, norm, routing, routed, scratch)
    y, parts = torch.empty(tokens, topk, hidden), x.clone()
    for last, kept in ((False, own < 2), (False, own == 3), (True, (own >= 2) & (own != 3))):
        part = torch.where(kept, own, -1)
        some = replace(stack, index1_E=part, index2_E=part)
        decode.experts_block(routed, some, y, parts, scratch, combine=last)
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("kind", TYPES)
def test_a_token_has_the_same_bits_in_any_streamed_batch(kind):
    hidden, ffn, experts = 52, 68, 4
    stack, norm = make_experts(hidden, ffn, experts, experts, kind, True, False), make_norm(hidden, True, False)
    routing, x = Routing(normal(16, experts, hidden), ChoiceRule(2, pre_softmax=True)), normal(17, 150, hidden)
    layer = make_attention(hidden, 2, 2, 13, kind, "rope", torch.float32, 1)

    def block(rows: torch.Tensor) -> torch.Tensor:
        out = rows.clone()
        scratch = torch.empty(decode.mlp_scratch(len(rows), hidden, ffn, 2, experts))
        decode.mlp_block(out, norm, routing, stack, scratch)
        return decode.linear(out, layer.output, None, torch.empty(len(rows), hidden))

    with cpu_products.using(fp32_tokens=2**62, bf16_tokens=2**62):
        together = block(x)
        for rows in (slice(0, 1), slice(7, 9), slice(20, 33), slice(40, 150)):
            assert torch.equal(block(x[rows].contiguous()), together[rows])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("coefficients", [[0.5, -1.25, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
def test_combine_rows(kind, coefficients):
    banks = [stored(normal(seed, 7, 45), kind) for seed in range(3)]
    out = Weight(torch.empty_like(banks[0].data), None if kind != "int8" else torch.empty(7))
    decode.combine_rows(banks, torch.tensor(coefficients), out)
    exact = sum(bank.dequantized() * c for bank, c in zip(banks, coefficients, strict=True))
    if kind == "int8":
        assert ((out.dequantized() - exact).abs() <= out.scale[:, None] * 0.501 + 1e-6).all()
    else:
        torch.testing.assert_close(out.data, exact.to(out.data.dtype), rtol=1e-6 if kind == "fp32" else 8e-3, atol=1e-6)


def test_bad_arguments_are_refused():
    x, out = normal(1, 2, 8), torch.empty(2, 4)
    with pytest.raises(RuntimeError, match="not 4 x 8"):
        decode.linear(x, stored(normal(2, 4, 9), "fp32"), None, out)
    with pytest.raises(RuntimeError, match="int8 weights, and they alone, have scales"):
        decode.linear(x, Weight(torch.zeros(4, 8, dtype=torch.int8)), None, out)
    stack, norm = make_experts(8, 6, 2, 2, "fp32", True, False), make_norm(8, True, False)
    routing = Routing(normal(3, 2, 8), ChoiceRule(1))
    with pytest.raises(RuntimeError, match="scratch is too small"):
        decode.mlp_block(x, norm, routing, stack, torch.empty(8))
    with pytest.raises(RuntimeError, match=r"index1\[1\] = 2 of 2"):
        broken = replace(stack, index1_E=torch.tensor([0, 2]))
        decode.mlp_block(x, norm, routing, broken, torch.empty(4096))
    layer = make_attention(8, 1, 1, 4, "fp32", "plain", torch.float32, 2)
    pages = torch.zeros(1, 1, dtype=torch.int32)
    places = Places(torch.tensor([0, 16], dtype=torch.int32), torch.zeros(2, dtype=torch.int32), pages)
    with pytest.raises(RuntimeError, match="position 16 of 16"):
        decode.attention_block(x, layer, places, torch.empty(4096))


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
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, str(plans)]
    environment = {**os.environ, "MEGATRON_SAMOE_ISA": instruction_set}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:]
