"""Attention by blocks against its slow twin, which computes the whole square: results and all gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_samoe.ops import attention as blocks
from megatron_samoe.ops import reference
from megatron_samoe.ops.attention import ScoreRule, attention, band
from tests.harness.largest_tensor import LargestTensor

B, A, D = 2, 4, 6
SINKS = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
RULES = {
    "plain": ScoreRule(),
    "window 1": ScoreRule(window=1),
    "window": ScoreRule(window=5),
    "wide window": ScoreRule(window=100),
    "cap": ScoreRule(softcap=0.7),
    "sinks": ScoreRule(sinks_A=SINKS),
    "scale": ScoreRule(scale=0.7),
    "all": ScoreRule(window=7, softcap=2.0, sinks_A=SINKS, scale=0.3),
}


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("block", [3, 8, 512])
@pytest.mark.parametrize(("queries", "keys"), [(17, 17), (1, 17), (6, 17), (1, 1)])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rule", RULES)
def test_blocks_equal_the_whole_square(
    rule: str, groups: int, queries: int, keys: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    sinks = None if RULES[rule].sinks_A is None else SINKS.clone().requires_grad_()
    chosen = replace(RULES[rule], sinks_A=sinks)
    inputs = [drawn(B, A, queries, D, seed=1), drawn(B, groups, keys, D, seed=2), drawn(B, groups, keys, D, seed=3)]
    asked = [*inputs, *([] if sinks is None else [sinks])]
    y, expected = attention(*inputs, chosen), reference.attention(*inputs, chosen)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found, twins = torch.autograd.grad(y, asked, grad), torch.autograd.grad(expected, asked, grad)
    for own, twin in zip(found, twins, strict=True):
        torch.testing.assert_close(own, twin, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_documents_stay_apart(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 4)
    inputs = [drawn(B, A, 11, D, seed=1), drawn(B, 2, 11, D, seed=2), drawn(B, 2, 11, D, seed=3)]
    ids = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 3]])
    mask = (ids[:, :, None] == ids[:, None, :])[:, None] & band(11, 11, None, torch.device("cpu"))
    y, expected = attention(*inputs, RULES[rule], mask), reference.attention(*inputs, RULES[rule], mask)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rule", ["window", "cap", "all"])
def test_no_tensor_is_a_sequence_squared(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    length = 1024
    monkeypatch.setattr(blocks, "BLOCK", 64)
    q, k, v = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3))
    chosen = RULES[rule] if RULES[rule].sinks_A is None else ScoreRule(RULES[rule].window, 2.0, torch.zeros(1))
    with LargestTensor() as largest:
        attention(q, k, v, chosen).sum().backward()
    assert largest.elements < length * length / 8


def test_half_precision_scores_are_computed_in_fp32() -> None:
    q, k, v = (drawn(1, 2, 9, 8, seed=i).detach() for i in range(3))
    rule = ScoreRule(softcap=1.0, sinks_A=torch.zeros(2))
    y = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), rule)
    expected = reference.attention(*(t.bfloat16().double() for t in (q, k, v)), rule)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.02)
