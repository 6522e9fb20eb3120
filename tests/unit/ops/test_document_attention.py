"""Attention within documents piece by piece, against the slow twin, and without a tensor as large as a sequence squared."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_samoe.ops import document_attention as op
from megatron_samoe.ops import reference
from megatron_samoe.ops.attention import ScoreRule
from megatron_samoe.ops.document_attention import Documents, document_attention
from tests.harness.largest_tensor import LargestTensor


def ids_of(rows: list[list[int]]) -> Tensor:
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])


def random_inputs(batch: int, length: int, groups: int = 2, heads: int = 4, dim: int = 6) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    return tuple(
        torch.randn(batch, count, length, dim, generator=generator, dtype=torch.float64).requires_grad_()
        for count in (heads, groups, groups)
    )


ROWS = {
    "one each": [[24], [24]],
    "cut alike": [[5, 3, 16], [5, 3, 16]],
    "unlike": [[1] * 24, [20, 4]],
    "short and long": [[2, 2, 12, 3, 5], [24]],
}


@pytest.mark.parametrize("block", [1, 8, 100])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("rule", ["plain", "window", "cap and sinks"])
def test_pieces_are_the_twin_with_all_gradients(
    block: int, rows: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "BLOCK", block)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    rules = {
        "plain": ScoreRule(),
        "window": ScoreRule(window=4),
        "cap and sinks": ScoreRule(softcap=2.0, sinks_A=sinks),
    }
    inputs, documents = random_inputs(2, 24), Documents(ids_of(ROWS[rows]))
    y = document_attention(*inputs, rules[rule], documents)
    expected = reference.attention(*inputs, rules[rule], documents.mask())
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    wanted = [*inputs, *([sinks] if rule == "cap and sinks" else [])]
    weight = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for got, right in zip(*(torch.autograd.grad((t * weight).sum(), wanted) for t in (y, expected)), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-10)


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=30), min_size=1, max_size=4), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_cuts_keep_documents_whole(rows: list[list[int]], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "BLOCK", block)
        for row in rows:
            cuts = op._cuts(row)
            assert sum(size for size, _ in cuts) == sum(row)
            ends, whole = set(torch.tensor(row).cumsum(0).tolist()), 0
            for size, is_one in cuts:
                whole += size
                assert whole in ends and (size in row if is_one else size <= block)


def test_lengths_and_ends() -> None:
    documents = Documents(ids_of([[3, 1, 2], [6]]))
    assert documents.lengths == ((3, 1, 2), (6,))
    ends, longest = documents.ends
    assert ends.tolist() == [0, 3, 4, 6, 12] and ends.dtype == torch.int32 and longest == 6


@pytest.mark.parametrize("rule", [ScoreRule(), ScoreRule(window=300)])
def test_no_tensor_is_as_large_as_a_sequence_squared(rule: ScoreRule) -> None:
    length, dim = 6144, 4
    inputs = tuple(t.detach().float().requires_grad_() for t in random_inputs(1, length, 1, 1, dim))
    documents = Documents(ids_of([[4000, *[16] * 100, 144, 400]]))
    with LargestTensor() as seen:
        document_attention(*inputs, rule, documents).sum().backward()
    # Of a block of queries with the keys of its window at most; the square has 37 million.
    assert seen.elements <= 2 * op.BLOCK * (op.BLOCK + 300)
