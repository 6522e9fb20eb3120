"""Tokens that travel in parts, behind the experts of other parts: the same numbers, in an order that overlaps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_samoe.config import ParallelConfig, PretrainConfig
from megatron_samoe.moe.alltoall_dispatcher import AllToAllDispatcher
from megatron_samoe.ops.grouped_mlp import Counts
from megatron_samoe.parallel_state import Group, initialize_model_parallel
from megatron_samoe.row_exchange import overlapped_all_to_all
from tests.harness.exchanges import Transport
from tests.harness.layout_training import assert_same, train
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks
from tests.harness.tables import table
from tests.harness.tiny import tiny_config, with_layout, with_options

pytestmark = pytest.mark.distributed
TABLE = table(__file__)
E, H, T, K = 8, 16, 50, 2


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


@pytest.mark.parametrize("transport", ["shm 00", "shm 0000", "nccl 00", "nodes 0011"], indirect=True)
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


MODELS: dict[str, dict[str, Any]] = TABLE["models"]


def _trained(configs: list[PretrainConfig], chunks: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each model trained with one exchange, and with several that overlap, on the same processes."""
    results = []
    for config in configs:
        overlap = config.moe.moe_shared_expert_intermediate_size is not None
        chunked = with_options(config, moe_dispatch_chunks=chunks, moe_shared_expert_overlap=overlap)
        results.append((train(config, steps=2), train(chunked, steps=2)))
    return results if dist.get_rank() == 0 else []


@pytest.mark.parametrize(
    ("world", "sizes", "chunks"),
    first_by_day(
        [(2, {"ep": 2}, 3), (4, {"tp": 2, "ep": 4, "etp": 1, "sp": True, "overlap": True, "bucket": 3000}, 2)]
    ),
)
def test_training_in_parts_equals_training_in_one_and_one_process(
    world: int, sizes: dict[str, Any], chunks: int
) -> None:
    configs = [with_options(tiny_config(**options), num_experts=8) for options in MODELS.values()]
    results = run_ranks(_trained, world, [with_layout(config, **sizes) for config in configs], chunks)[0]
    for name, config, (whole, parts) in zip(MODELS, configs, results, strict=True):
        assert_same(parts, train(config, steps=2), rtol=1e-5)
        # Combining per layer adds the coefficients' gradient up by parts.
        rtol = 1e-6 if name == "samoe layer" else 0.0
        for key in ("losses", "norms"):
            torch.testing.assert_close(torch.tensor(parts[key]), torch.tensor(whole[key]), rtol=rtol, atol=0.0)
        for kind in ("gradients", "weights"):
            for tensor, expected in whole[kind].items():
                atol = rtol * expected.abs().max().item()
                torch.testing.assert_close(parts[kind][tensor], expected, rtol=rtol, atol=atol, msg=f"{name} {tensor}")
