"""Tokens to experts and back: one rank against a loop, several ranks against one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_samoe.config import ParallelConfig
from megatron_samoe.moe.alltoall_dispatcher import AllToAllDispatcher, expert_major_order
from megatron_samoe.ops.grouped_mlp import Counts
from megatron_samoe.parallel_state import Group, initialize_model_parallel, single_process_state
from tests.harness.ranks import run_ranks

E, H, T, K = 4, 3, 9, 2


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_expert_major_order_sorts_arrivals_by_expert_then_sender(world: int, e: int, data: st.DataObject) -> None:
    counts = [[data.draw(st.integers(0, 4)) for _ in range(e)] for _ in range(world)]
    arrivals = [
        (expert, sender, i) for sender in range(world) for expert in range(e) for i in range(counts[sender][expert])
    ]
    order = expert_major_order(torch.tensor(counts), len(arrivals))
    assert [arrivals[i] for i in order.tolist()] == sorted(arrivals)


def route(seed: int, dropped: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=generator, dtype=torch.float64)
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    if dropped:
        ids[torch.rand(T, K, generator=generator) < 0.4] = -1
        ids[0] = -1
    return x, ids, torch.rand(T, K, generator=generator, dtype=torch.float64)


def expert(e: int, rows: Tensor) -> Tensor:
    return rows * (e + 2) + e


def round_trip(group: Group, seed: int, dropped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the layer's output and the gradients of tokens and weights."""
    x, ids, probs = route(seed, dropped)
    x.requires_grad_()
    probs.requires_grad_()

    def experts(rows_RH: Tensor, rows_per_expert: Counts) -> Tensor:
        assert isinstance(rows_per_expert, Tensor) and rows_per_expert.sum() == rows_RH.shape[0]
        first = group.rank * len(rows_per_expert)
        parts = rows_RH.split(rows_per_expert.tolist())
        return torch.cat([expert(first + e, rows) for e, rows in enumerate(parts)])

    y = AllToAllDispatcher(E, group).dispatch(x, ids).through(experts, probs)
    (y.sin().sum()).backward()
    assert x.grad is not None and probs.grad is not None
    return y.detach(), x.grad, probs.grad


def by_loop(seed: int, dropped: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, ids, probs = route(seed, dropped)
    x.requires_grad_()
    probs.requires_grad_()
    rows = []
    for t in range(T):
        chosen = [expert(int(ids[t, k]), x[t]) * probs[t, k] for k in range(K) if ids[t, k] >= 0]
        rows.append(sum(chosen, torch.zeros(H, dtype=torch.float64)))
    y = torch.stack(rows)
    y.sin().sum().backward()
    assert x.grad is not None and probs.grad is not None
    return y.detach(), x.grad, probs.grad


@pytest.mark.parametrize("dropped", [False, True])
def test_one_rank_equals_a_loop(dropped: bool) -> None:
    torch.testing.assert_close(
        round_trip(single_process_state().ep, 1, dropped), by_loop(1, dropped), rtol=1e-12, atol=1e-12
    )


def on_rank(dropped: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    world = torch.distributed.get_world_size()
    state = initialize_model_parallel(ParallelConfig(expert_model_parallel_size=world))
    return [round_trip(state.ep, 10 * batch + state.rank, dropped) for batch in range(3)]


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("dropped", [False, True])
def test_several_ranks_equal_the_loop(world: int, dropped: bool) -> None:
    for rank, results in enumerate(run_ranks(on_rank, world, dropped)):
        for batch, result in enumerate(results):
            torch.testing.assert_close(result, by_loop(10 * batch + rank, dropped), rtol=1e-12, atol=1e-12)


def skewed() -> Tensor:
    """Every rank sends all its tokens to the last rank's last expert."""
    state = initialize_model_parallel(ParallelConfig(expert_model_parallel_size=2))

    def experts(rows_RH: Tensor, rows_per_expert: Counts) -> Tensor:
        assert isinstance(rows_per_expert, Tensor)
        assert rows_per_expert.tolist() == ([0, 2 * T] if state.rank == 1 else [0, 0])
        return rows_RH * 10

    x = torch.full((T, H), float(state.rank + 1))
    trip = AllToAllDispatcher(E, state.ep).dispatch(x, torch.full((T, 1), E - 1))
    return trip.through(experts, torch.ones(T, 1))


@pytest.mark.distributed
def test_a_rank_may_receive_everything_or_nothing() -> None:
    for rank, y in enumerate(run_ranks(skewed, 2)):
        assert torch.equal(y, torch.full((T, H), 10.0 * (rank + 1)))
