"""A rank of a world that does not exist, on tensors without storage: the memory of its training step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_samoe.config import PretrainConfig
from megatron_samoe.distributed.grad_buffer import GradBuffers
from megatron_samoe.models.rank_model import RankModel, compute_dtype
from megatron_samoe.moe.alltoall_dispatcher import AllToAllDispatcher
from megatron_samoe.ops.asynchronous import taken_for_gpu
from megatron_samoe.optimizer import mixed_precision
from megatron_samoe.optimizer.mixed_precision import LossScale, MixedPrecisionOptimizer
from megatron_samoe.parallel_state import RankGrid
from megatron_samoe.parallel_state.state import Group, PendingShift, initialize_model_parallel
from megatron_samoe.pipeline_parallel.schedules import Pipeline
from megatron_samoe.planning.memory import rank_memory
from megatron_samoe.tensor_parallel import ring_attention
from megatron_samoe.training.setup import TrainSetup
from megatron_samoe.training.state import TrainState
from megatron_samoe.training.train_step import accumulate_gradients
from tests.harness.live_memory import LiveMemory


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


class _RMSNorm(torch.autograd.Function):
    """Keeps what the fused kernel does: its input, and a number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _piece(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """What flash attention leaves of a piece."""
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _piece_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@contextlib.contextmanager
def device_without_storage(rows_for_each_rank_and_expert: int, world: int) -> Iterator[None]:
    """`meta` as an H100 of a world that does not exist, whose collectives torch's fake process group answers; the other ranks send
    as many rows as this one."""

    def table(dispatcher: AllToAllDispatcher, _copy: object) -> Tensor:
        size = dispatcher.group.size
        return torch.full((2, size, dispatcher.num_experts // size), rows_for_each_rank_and_expert)

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Attention.apply(query, key, value)

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        with (
            taken_for_gpu("meta"),
            mock.patch.object(AllToAllDispatcher, "awaited", table),
            mock.patch.object(Group, "all_gather_object", lambda group, value: [value] * group.size),
            mock.patch.object(torch.nn.functional, "rms_norm", lambda x, shape, weight, eps: _RMSNorm.apply(x, weight)),
            mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention),
            # torch's exchanges between two ranks know no backend of tensors without storage.
            mock.patch.object(Group, "start_shift", lambda group, x: PendingShift(group, torch.empty_like(x), x, ())),
            mock.patch.object(ring_attention, "attention_piece", _piece),
            mock.patch.object(ring_attention, "attention_piece_backward", _piece_backward),
            mock.patch.object(mixed_precision, "_make_adam", lambda *_: SimpleNamespace(state={}, param_groups=[])),
        ):
            yield
    finally:
        dist.destroy_process_group()


def step_peak(config: PretrainConfig, vocab_size: int, world: int) -> tuple[int, int, int]:
    """Returns the measured peak of one rank's step, in bytes, the planned one, and what is held before the step.

    Experts have equally many tokens. The optimizer has its state, and its update is left out; ranks that update slices then
    gather the weights.
    """
    layout = config.parallel
    grid = RankGrid.of(layout, world)
    tokens = config.training.micro_batch_size * config.model.seq_length // layout.context_parallel_size
    if grid.etp < grid.tp:  # whole experts: each of these ranks sends its share of the tokens
        tokens //= grid.tp
    num_experts = config.moe.num_experts if config.moe.expert_layout != "dense" else 1
    with device_without_storage(tokens * config.moe.moe_router_topk // num_experts, world):
        state = initialize_model_parallel(layout, "meta")
        model = RankModel(config, vocab_size, state, compute_dtype(config))
        buffers = GradBuffers(
            model.global_parameters(), state, layout.use_distributed_optimizer, bucket_size=layout.ddp_bucket_size
        )
        optimizer = MixedPrecisionOptimizer(buffers, config.optimizer, state)
        setup = TrainSetup(config, state, model, buffers, optimizer, Pipeline(0, 1, 1, None))
        moments = [t for name in optimizer.masters for t in optimizer.moments(name).values()]
        gathered = [b.weights for b in buffers.buffers if b.weights is not None]
        held = [
            *model.parameters(),
            *(b.flat for b in buffers.buffers),
            *gathered,
            *optimizer.masters.values(),
            *moments,
        ]
        shape = (config.training.micro_batch_size, config.model.seq_length)
        ids = torch.zeros(shape, dtype=torch.int64, device="meta")
        batches = [{"tokens": ids, "labels": ids, "loss_mask": torch.ones(shape, device="meta")}]
        with LiveMemory(held=held) as memory:
            before = memory.peak
            accumulate_gradients(setup, TrainState(0, 0, 0, LossScale()), batches)
            buffers.gather_weights()
    return memory.peak, rank_memory(config, vocab_size, world).total, before
