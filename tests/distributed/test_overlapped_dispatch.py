"""Tokens that travel in parts, behind the experts of other parts: the same numbers, in an order that overlaps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.config import ParallelConfig
from megatron_samoe.moe.alltoall_dispatcher import AllToAllDispatcher
from megatron_samoe.ops.grouped_mlp import Counts
from megatron_samoe.parallel_state import Group, initialize_model_parallel
from megatron_samoe.row_exchange import overlapped_all_to_all
from tests.harness.exchanges import Transport
from tests.harness.layout_training import assert_same, train
from tests.harness.ranks import run_ranks
from tests.harness.tiny import tiny_config, with_layout, with_options

pytestmark = pytest.mark.distributed
E, H, T, K = 12, 16, 50, 2


def round_trip(group: Group, dtype: torch.dtype, num_chunks: int | None) -> tuple[Tensor, ...]:
    """Output and gradients over a group, some tokens dropped and some experts unused; None for one exchange."""
    generator = torch.Generator().manual_seed(group.rank)
    x = torch.randn(T, H, generator=generator).to(dtype).requires_grad_()
    ids = torch.stack([torch.randperm(E - 1, generator=generator)[:K] for _ in range(T)])
    ids[torch.rand(T, K, generator=generator) < 0.2] = -1
    probs = torch.rand(T, K, generator=generator).requires_grad_()
    scale_e = torch.arange(1.0, E // group.size + 1, dtype=dtype).requires_grad_()

    def experts(rows_RH: Tensor, rows_per_expert: Counts) -> Tensor:
        assert isinstance(rows_per_expert, Tensor)
        return rows_RH.sin() * scale_e.repeat_interleave(rows_per_expert)[:, None]

    y = AllToAllDispatcher(E, group, num_chunks).dispatch(x, ids).through(experts, probs)
    gradients = torch.autograd.grad((y.float().cos() * torch.arange(T)[:, None]).sum(), (x, probs, scale_e))
    return y.detach(), *gradients


def _parts_and_whole(transport: Transport) -> None:
    world = transport.world_size
    through_torch = initialize_model_parallel(ParallelConfig(expert_model_parallel_size=world)).ep
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        expected = round_trip(through_torch, dtype, None)
        for group in (through_torch, replace(through_torch, exchange=transport.open())):
            for num_chunks in {None, 1, 2, E // world - 1, E // world}:
                parts = round_trip(group, dtype, num_chunks)
                for ours, theirs in zip(parts[:3], expected[:3], strict=True):
                    assert torch.equal(ours, theirs), (dtype, num_chunks)
                torch.testing.assert_close(parts[3], expected[3])  # one sum for an expert, of rows in one order


@pytest.mark.parametrize("transport", ["shm 00", "shm 0000", "shm 001", "nccl 00", "nodes 0011"], indirect=True)
def test_parts_equal_the_whole_bit_for_bit(transport: Transport) -> None:
    run_ranks(_parts_and_whole, transport.world_size, transport)


def _order_of_work() -> tuple[list[str], list[str]]:
    """What a layer of three parts starts and computes, forwards and backwards, the shared expert among it."""
    state = initialize_model_parallel(ParallelConfig(expert_model_parallel_size=2))
    done: list[str] = []
    started = overlapped_all_to_all._start_gathered

    def start_gathered(*arguments: Any) -> Any:
        done.append("send")
        return started(*arguments)

    overlapped_all_to_all._start_gathered = start_gathered

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, name: str) -> Tensor:  # type: ignore[override]
            ctx.name = name
            done.append(name)
            return x * 2

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            done.append(ctx.name)
            return dy * 2, None

    x = torch.randn(T, H).requires_grad_()
    ids = torch.arange(T * K).view(T, K) % 6
    trip = AllToAllDispatcher(6, state.ep, 3).dispatch(x, ids)
    shared = Marked.apply(x, "shared")
    parts = iter(range(3))
    y = trip.through(lambda rows, _: Marked.apply(rows, f"experts {next(parts)}"), torch.full((T, K), 0.5)) + shared
    forward = list(done)
    done.clear()
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((T, H), 4.0))  # half of two choices, twice, and the shared expert
    return forward, list(done)


def test_exchanges_start_before_the_experts_that_they_hide_behind() -> None:
    forward, backward = run_ranks(_order_of_work, 2)[0]
    assert forward == ["send", "send", "send", "shared", "experts 0", "send", "experts 1", "send", "experts 2", "send"]
    # The gradients of all results are sent at once (plain rows); then each part's inputs' gradients, behind the next.
    assert backward == ["experts 2", "send", "experts 1", "send", "experts 0", "send", "shared"]


def test_training_in_parts_beside_the_shared_expert_equals_one_process() -> None:
    """Three parts of eight experts. Layouts of the parity table train in two."""
    config = tiny_config("moe", style="llama", num_experts=8, moe_router_topk=2, moe_shared_expert_intermediate_size=16)
    overlapped = with_options(with_layout(config, ep=2), moe_dispatch_chunks=3, moe_shared_expert_overlap=True)
    assert_same(run_ranks(train, 2, overlapped, torch.float32, 2)[0], train(config, steps=2), rtol=1e-5)
