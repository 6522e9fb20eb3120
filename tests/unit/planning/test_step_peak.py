"""The peak memory of a training step by a GPU's algorithms, on tensors without storage, against the planner's formula."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_samoe.config.cli import from_mapping, read_yaml
from megatron_samoe.distributed.grad_buffer import GradBuffers
from megatron_samoe.models.rank_model import RankModel, compute_dtype
from megatron_samoe.moe.alltoall_dispatcher import AllToAllDispatcher
from megatron_samoe.ops import asynchronous, grouped_products
from megatron_samoe.ops.combine import combine_banks, combine_banks_backward
from megatron_samoe.optimizer import mixed_precision
from megatron_samoe.optimizer.mixed_precision import LossScale, MixedPrecisionOptimizer
from megatron_samoe.parallel_state import RankGrid
from megatron_samoe.parallel_state.state import Group, planned_state
from megatron_samoe.pipeline_parallel.schedules import Pipeline
from megatron_samoe.planning.memory import rank_memory
from megatron_samoe.row_exchange import all_to_all
from megatron_samoe.training.setup import TrainSetup
from megatron_samoe.training.state import TrainState
from megatron_samoe.training.train_step import accumulate_gradients
from tests.harness.live_memory import LiveMemory
from tests.harness.tiny import with_options

CONFIG = Path(__file__).resolve().parents[3] / "examples/configs/gpt_1.3b_samoe128.yaml"
VOCAB_SIZE, WORLD = 50257, 32


class _Attention(torch.autograd.Function):
    """Keeps what a fused attention kernel does: its inputs, its output, and a sum for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        y = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, y, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _exchange(x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], group: Group) -> Tensor:
    return x.new_empty((sum(receive_rows), *x.shape[1:]))


@contextlib.contextmanager
def device_without_storage(rows_for_each_rank_and_expert: int) -> Iterator[None]:
    """`meta` as a GPU of a world that does not exist: it runs behind the host, has torch's grouped product, and the other
    ranks send as many rows as this one.
    """

    def table(dispatcher: AllToAllDispatcher, _copy: object) -> Tensor:
        size = dispatcher.group.size
        return torch.full((2, size, dispatcher.num_experts // size), rows_for_each_rank_and_expert)

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Attention.apply(query, key, value)

    with (
        mock.patch.object(asynchronous, "DEVICE_TYPES", frozenset({"meta"})),
        mock.patch.object(grouped_products, "use_grouped_mm", lambda *operands: True),
        mock.patch.object(AllToAllDispatcher, "_awaited", table),
        mock.patch.object(all_to_all, "_exchange", _exchange),
        mock.patch.object(Group, "all_reduce", lambda group, x, *_: x),
        mock.patch.object(Group, "start_all_reduce", lambda group, x: None),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention),
        mock.patch.object(mixed_precision, "_make_adam", lambda *_: SimpleNamespace(state={}, param_groups=[])),
    ):
        yield


def peak(when: str, **options: Any) -> tuple[int, int]:
    """Returns the measured and the planned peak, in bytes, of one rank's step."""
    config = from_mapping(read_yaml(CONFIG), CONFIG.name)
    config = with_options(config, samoe_combine=when, global_batch_size=4 * WORLD, **options)
    state = planned_state(RankGrid.of(config.parallel, WORLD), 0)
    tokens = config.training.micro_batch_size * config.model.seq_length
    with device_without_storage(tokens * config.moe.moe_router_topk // 128):
        model = RankModel(config, VOCAB_SIZE, state, compute_dtype(config))
        buffers = GradBuffers(model.global_parameters(), state)
        optimizer = MixedPrecisionOptimizer(buffers, config.optimizer, state)
        setup = TrainSetup(config, state, model, buffers, optimizer, Pipeline(0, 1, 1, None))
        moments = [t for name in optimizer.masters for t in optimizer.moments(name).values()]
        held = [*model.parameters(), *(b.flat for b in buffers.buffers), *optimizer.masters.values(), *moments]
        shape = (config.training.micro_batch_size, config.model.seq_length)
        ids = torch.zeros(shape, dtype=torch.int64, device="meta")
        batches = [{"tokens": ids, "labels": ids, "loss_mask": torch.ones(shape, device="meta")}]
        with LiveMemory(held=held) as memory:
            accumulate_gradients(setup, TrainState(0, 0, 0, LossScale()), batches)
    return memory.peak, rank_memory(config, VOCAB_SIZE, WORLD).total


@pytest.mark.parametrize("when", ["step", "layer"])
def test_a_step_of_samoe_128_needs_what_the_formula_says(when: str) -> None:
    """1.3 B with 128 experts in 12 layers, 4 of each on a rank."""
    measured, planned = peak(when)
    assert measured == pytest.approx(planned, rel=0.05), (measured / 2**30, planned / 2**30)


def test_combining_holds_no_copy_of_the_weights() -> None:
    """The pool of a model of 24 layers with 64 experts of 2048 x 1408: 9 GB of weights in bf16 a tensor."""
    layers, banks, elements = 24, 6, 64 * 2048 * 1408
    a = torch.empty(layers, 1, banks, device="meta")
    pool = torch.empty(banks, 1, elements, device="meta")
    pool_grad, grads = torch.empty_like(pool), torch.empty(layers, 1, elements, device="meta")
    weights = torch.empty(layers, 1, elements, dtype=torch.bfloat16, device="meta")
    held = [a, pool, pool_grad, grads, weights]
    with LiveMemory(held=held) as memory:
        at_rest = memory.peak
        combine_banks(a, pool, weights)
        combine_banks_backward(a, pool, grads, pool_grad)
    assert memory.peak - at_rest < 0.02 * weights.nbytes
