"""Gradients of several ranks, whole or sharded: the sums, the norm and the update are the same."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_samoe.config import OptimizerConfig, ParallelConfig
from megatron_samoe.dist_checkpointing.sharded_state import sharded
from megatron_samoe.distributed.grad_buffer import GradBuffers
from megatron_samoe.optimizer.clip_grads import clip_factor, global_grad_norm
from megatron_samoe.optimizer.mixed_precision import MixedPrecisionOptimizer
from megatron_samoe.parallel_state import ParameterTag, backend, initialize_model_parallel, set_tag
from tests.harness.ranks import run_ranks
from tests.harness.tiny import gather_global

pytestmark = pytest.mark.distributed
SHAPES = {"a.weight": (3, 5), "b.weight": (1,), "c.bias": (4,), "d.weight": (2, 2, 3)}
STEPS = 3


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}
    return {name: set_tag(p, ParameterTag()) for name, p in made.items()}


def rank_gradient(shape: tuple[int, ...], rank: int, step: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + rank))


def train(is_sharded: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Returns summed gradients, norms and weights after some steps on the group's ranks."""
    state = initialize_model_parallel(ParallelConfig())
    named = parameters(dtype)
    buffers = GradBuffers(named, state, is_sharded)
    optimizer = MixedPrecisionOptimizer(buffers, OptimizerConfig(weight_decay=0.1))
    norms, gradients = [], {}
    for step in range(STEPS):
        buffers.zero()
        for p in named.values():
            (p.float() * rank_gradient(p.shape, state.rank, step)).sum().backward()
        buffers.reduce()
        gradients = gather_global({p.name: sharded(p.grad, p.tag.shard, state, p.slice) for p in buffers.pieces}, state)
        gradients = {name: gradient.clone() for name, gradient in gradients.items()}
        norms.append(global_grad_norm(buffers.pieces, state).item())
        optimizer.step(0.1, clip_factor(norms[-1], 2.0))
    updated = sum(piece.weight.numel() for piece in buffers.pieces)
    return {
        "gradients": gradients,
        "norms": norms,
        "updated": updated,
        "weights": {n: p.detach() for n, p in named.items()},
    }


@cache
def results(world: int, is_sharded: bool, dtype: torch.dtype) -> list[dict[str, Any]]:
    return run_ranks(train, world, is_sharded, dtype)


def test_gradients_are_summed_over_ranks() -> None:
    for is_sharded in (False, True):
        of_ranks, total = results(3, is_sharded, torch.float32), 0.0
        for name, shape in SHAPES.items():
            expected = sum((rank_gradient(shape, rank, STEPS - 1) for rank in range(3)), torch.zeros(shape))
            torch.testing.assert_close(of_ranks[0]["gradients"][name], expected, rtol=1e-6, atol=1e-6)
            total += float(expected.double().square().sum())
        for result in of_ranks:
            assert result["norms"][-1] == pytest.approx(total**0.5, rel=1e-6), "the norm is that of the whole sum"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 3])
def test_sharded_updates_equal_whole_ones(world: int, dtype: torch.dtype) -> None:
    whole, shared = results(world, False, dtype), results(world, True, dtype)
    begun = parameters(dtype)
    for rank in range(world):
        assert shared[rank]["norms"] == pytest.approx(whole[0]["norms"], rel=1e-6)
        for name, weight in whole[0]["weights"].items():
            torch.testing.assert_close(
                shared[rank]["weights"][name], weight, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
            )
            assert torch.equal(shared[rank]["weights"][name], shared[0]["weights"][name]), "ranks stay equal"
            assert not torch.equal(weight, begun[name])
    elements = sum(parameters(dtype)[name].numel() for name in SHAPES)
    assert [result["updated"] for result in whole] == [elements] * world
    assert sum(result["updated"] for result in shared) == elements, "each element is updated by one rank"
    assert max(result["updated"] for result in shared) == -(-elements // world)


def threads_at_the_end() -> list[str]:
    """Trains a step, lets everything go, ends the process groups, and returns gloo's threads that are left."""
    train(False, torch.float32)
    backend.leave_distributed()
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_no_thread_of_the_process_groups_meets_the_end_of_the_interpreter() -> None:
    """One that then wants the interpreter's lock aborts the process: a job that succeeded ends in SIGABRT."""
    assert run_ranks(threads_at_the_end, 2) == [[], []]
