"""Attention over ranks that each hold a part of every sequence, against the twin in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_samoe.config import ParallelConfig
from megatron_samoe.ops import reference
from megatron_samoe.ops.attention import ScoreRule
from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.parallel_state.token_share import whole_sequences
from megatron_samoe.tensor_parallel.ring_attention import ring_attention
from tests.harness.largest_tensor import LargestTensor
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed


def inputs(length: int, heads: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    """Returns queries, keys, values and gradients of the result, of whole sequences."""
    generator = torch.Generator().manual_seed(length)
    shapes = ((2, heads, length, 6), (2, groups, length, 6), (2, groups, length, 6), (2, heads, length, 6))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def attend(length: int, heads: int, groups: int, scale: float | None, dtype: torch.dtype) -> list[Tensor] | None:
    """Returns result and gradients of whole sequences on the first rank."""
    size = dist.get_world_size()
    state = initialize_model_parallel(ParallelConfig(context_parallel_size=size))
    *parts, dy = (state.token_share.of_sequences(t, 2) for t in inputs(length, heads, groups, dtype))
    own = [t.requires_grad_() for t in parts]
    y = ring_attention(*own, state.cp, scale)
    found = []
    for t in (y, *torch.autograd.grad(y, own, dy)):
        of_ranks = state.cp.all_gather(t.detach().transpose(1, 2).contiguous()[None])
        found.append(whole_sequences(of_ranks, size).transpose(1, 2))
    return found if state.rank == 0 else None


def attend_all(cases: list[tuple[Any, ...]]) -> list[list[Tensor] | None]:
    return [attend(*case) for case in cases]


CASES = [
    (24, 4, 4, None, torch.float64),
    (24, 4, 2, 0.7, torch.float64),
    (48, 6, 1, None, torch.float64),
    (24, 4, 2, None, torch.float32),
    (24, 4, 2, 0.7, torch.bfloat16),
]
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_ring_is_the_twin_with_all_gradients(size: int) -> None:
    for case, found in zip(CASES, run_ranks(attend_all, size, CASES)[0], strict=True):
        length, heads, groups, scale, dtype = case
        q, k, v, dy = (t.double() for t in inputs(length, heads, groups, dtype))
        wanted = [t.requires_grad_() for t in (q, k, v)]
        expected = reference.attention(q, k, v, ScoreRule(scale=scale))
        rtol = TOLERANCES[dtype]
        for got, right in zip(found, (expected, *torch.autograd.grad(expected, wanted, dy)), strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), right, rtol=rtol, atol=rtol, msg=lambda m, c=case: f"{c}: {m}")


def largest_of(length: int) -> int:
    state = initialize_model_parallel(ParallelConfig(context_parallel_size=2))
    q, k, v = (torch.randn(1, 1, length // 2, 8, requires_grad=True) for _ in range(3))
    with LargestTensor() as largest:
        ring_attention(q, k, v, state.cp).sum().backward()
    return largest.elements


def test_no_tensor_is_as_large_as_a_sequence_squared() -> None:
    length = 1024
    assert max(run_ranks(largest_of, 2, length)) <= 16 * length < length**2 / 32
