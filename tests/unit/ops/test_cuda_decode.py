"""Inference on CUDA without a GPU: the ops' own sources on CPU tensors, emulated, against the twins; and a whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_samoe.ops import decode, extension
from megatron_samoe.ops.decode import stored
from megatron_samoe.ops.decode_parts import Places, Routing, Weight
from megatron_samoe.ops.topk_gate import ChoiceRule
from tests.harness import decode_checks, emulated_cuda
from tests.unit.inference.test_runners import IDS, close, make, single, tables
from tests.unit.inference.tiny_models import forward_logits, step_logits
from tests.unit.ops.test_decode import make_attention, make_experts, make_norm, normal

KINDS = ("fp32", "bf16", "int8")
needs_library = pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")


@pytest.mark.parametrize("kind", KINDS)
def test_linear(kind: str, emulated: Any) -> None:
    for tokens, inputs, outputs in ((1, 64, 64), (3, 37, 11), (7, 1040, 13), (33, 24, 9), (0, 8, 8)):
        decode_checks.check_linear(tokens, inputs, outputs, kind)


def test_norm(emulated: Any) -> None:
    for tokens, hidden, rms in ((3, 5, True), (3, 300, True), (7, 64, False), (0, 8, False)):
        decode_checks.check_norm(tokens, hidden, rms)


@pytest.mark.parametrize(
    ("groups", "queries", "head_dim", "kind", "style", "length"),
    [
        (2, 1, 64, "fp32", "gpt", 7),
        (3, 2, 20, "fp32", "rope", 33),
        (1, 4, 128, "bf16", "rope", 19),
        (2, 5, 16, "int8", "plain", 17),
        (1, 2, 32, "fp32", "plain", 270),
    ],
)
def test_attention(groups: int, queries: int, head_dim: int, kind: str, style: str, length: int, emulated: Any) -> None:
    decode_checks.check_attention(groups, queries, head_dim, kind, style, length)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [True, False])
def test_experts(gated: bool, kind: str, emulated: Any) -> None:
    for tokens, experts, topk in ((1, 4, 2), (33, 5, 1), (7, 9, 8), (6, 1, 0)):
        decode_checks.check_mlp(tokens, experts, topk, kind, gated)


@pytest.mark.parametrize("kind", KINDS)
def test_combine_rows(kind: str, emulated: Any) -> None:
    for coefficients in ([0.5, -1.25, 0.0], [0.0, 0.0, 1.0], [0.0]):
        decode_checks.check_combine_rows(7, 44, kind, coefficients)
        decode_checks.check_combine_rows(3, 21, kind, coefficients)


@needs_library
@pytest.mark.parametrize(
    ("name", "serving"),
    [("dense gpt3", "folded"), ("moe shared", "folded"), ("samoe gpt3", "on-the-fly"), ("samoe llama", "selected")],
)
def test_a_models_logits(name: str, serving: Any, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, parts and single tokens of two sequences, as the training forward has them."""
    loaded = make(name, serving)
    ids = IDS[1:]
    expected = [forward_logits(loaded, row) for row in ids]
    pages = tables([len(row) for row in ids])
    runner = single(loaded, serving, pages.num_pages)
    runner._plan = None  # the CPU's alone
    monkeypatch.setattr(torch.ops, "megatron_samoe", library)
    with torch.profiler.profile() as profile:
        for step in ([(0, 0, 3), (1, 0, 17)], [(0, 3, 1), (1, 17, 2)], [(1, 19, 1), (0, 4, 1)]):
            got = step_logits(runner, pages, [(slot, first, ids[slot][first : first + n]) for slot, first, n in step])
            for (slot, first, n), logits in zip(step, got, strict=True):
                close(logits, expected[slot][first : first + n])
    seen = {event.key for event in profile.key_averages()}
    experts = "decode_moe_block" if name == "dense gpt3" or serving == "selected" else "decode_experts"
    for op in ("decode_linear", "decode_norm", "decode_attention_block", experts):
        assert f"{emulated_cuda.NAMESPACE}::{op}" in seen, op


def _refusals() -> dict[str, Callable[[], Any]]:
    """Calls with something wrong, by what is said."""
    x, out = normal(1, 2, 8), torch.empty(2, 4)
    stack, norm = make_experts(8, 6, 2, 2, "fp32", True, False), make_norm(8, True, False)
    routing, room = Routing(normal(3, 2, 8), ChoiceRule(1)), torch.empty(4096)
    layer = make_attention(8, 1, 1, 4, "fp32", "plain", torch.float32, 2)
    wide = make_attention(8, 1, 1, 260, "fp32", "plain", torch.float32, 2)
    zeros = torch.zeros(2, dtype=torch.int32)
    places = Places(zeros, zeros, torch.zeros(1, 1, dtype=torch.int32))
    bank = stored(normal(1, 3, 8), "fp32")
    unscaled, longer = Weight(torch.zeros(4, 8, dtype=torch.int8)), replace(stack, index1_E=torch.zeros(3).long())
    wide_weight, half = stored(normal(2, 4, 9), "fp32"), Weight(torch.zeros(4, 8).half())
    return {
        "w is .*, not 4 x 8": lambda: decode.linear(x, wide_weight, None, out),
        "int8 weights, and they alone, have scales": lambda: decode.linear(x, unscaled, None, out),
        "w is Half": lambda: decode.linear(x, half, None, out),
        "x is not contiguous": lambda: decode.linear(normal(1, 8, 2).t(), bank, None, out),
        "scratch is too small": lambda: decode.mlp_block(x, norm, routing, stack, torch.empty(8)),
        r"index2 is \[2\], not \[3\]": lambda: decode.mlp_block(x, norm, routing, longer, room),
        r"slots is \[1\], not \[2\]": lambda: decode.attention_block(
            x, layer, replace(places, slots_T=zeros[:1]), room
        ),
        "a head of 260, of at most 256": lambda: decode.attention_block(x, wide, places, torch.empty(9999)),
        "65 banks, of at most 64 on a GPU": lambda: decode.combine_rows([bank] * 65, torch.ones(65), bank),
    }


def test_what_is_refused(emulated: Any) -> None:
    for said, call in _refusals().items():
        with pytest.raises(RuntimeError, match=said):
            call()
