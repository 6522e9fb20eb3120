"""Pieces of attention against their slow twin, and put together against the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_samoe.ops import reference
from megatron_samoe.ops.attention import ScoreRule
from megatron_samoe.ops.attention_pieces import attention_piece, attention_piece_backward, merge

SCALE = 0.3


def inputs(dtype: torch.dtype, queries: int = 10, keys: int = 10, groups: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 4, queries, 6), (2, groups, keys, 6), (2, groups, keys, 6), (2, 4, queries, 6))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("keys", "is_causal"), [(10, True), (10, False), (7, False), (16, False)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_a_piece_is_its_twin_with_all_gradients(
    groups: int, keys: int, is_causal: bool, dtype: torch.dtype, tolerance: float
) -> None:
    q, k, v, dy = inputs(dtype, keys=keys, groups=groups)
    y, lse = attention_piece(q, k, v, is_causal, SCALE)
    wide = [t.double() for t in (q, k, v)]
    y_twin, lse_twin = reference.attention_piece(*wide, is_causal, SCALE)
    torch.testing.assert_close(y.double(), y_twin, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), lse_twin, rtol=max(tolerance, 1e-6), atol=max(tolerance, 1e-6))
    # More keys elsewhere have raised the sum of the whole.
    raised = lse + 0.5
    found = attention_piece_backward(dy, q, k, v, y, raised, is_causal, SCALE)
    expected = reference.attention_piece_backward(dy.double(), *wide, y.double(), raised.double(), is_causal, SCALE)
    for got, right in zip(found, expected, strict=True):
        assert got.dtype == dtype and got.shape == right.shape
        torch.testing.assert_close(got.double(), right, rtol=10 * tolerance, atol=10 * tolerance)


def test_the_twin_is_attention_and_its_gradients_are_autograds() -> None:
    q, k, v, dy = inputs(torch.float64)
    wanted = [t.requires_grad_() for t in (q, k, v)]
    whole = reference.attention(q, k, v, ScoreRule(scale=SCALE))
    y, lse = reference.attention_piece(q, k, v, True, SCALE)
    torch.testing.assert_close(y, whole, rtol=1e-12, atol=1e-12)
    found = reference.attention_piece_backward(dy, q, k, v, y, lse, True, SCALE)
    for got, right in zip(found, torch.autograd.grad(whole, wanted, dy), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("offset", [0.0, 200.0, -200.0])
def test_pieces_add_up(offset: float) -> None:
    q, k, v, _ = inputs(torch.float64, keys=12)
    k[:, :, 5:] += offset  # where one piece has all the weight nothing overflows
    y, lse = reference.attention_piece(q, k[:, :, :5], v[:, :, :5], False, SCALE)
    merge(y, lse, *reference.attention_piece(q, k[:, :, 5:], v[:, :, 5:], False, SCALE))
    whole, whole_lse = reference.attention_piece(q, k, v, False, SCALE)
    torch.testing.assert_close(y, whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-12, atol=1e-12)
