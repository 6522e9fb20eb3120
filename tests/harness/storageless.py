"""A rank of a world that does not exist, on tensors without storage: the memory of its training step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_samoe.config import PretrainConfig
from megatron_samoe.distributed.grad_buffer import GradBuffers
from megatron_samoe.models.rank_model import RankModel, compute_dtype
from megatron_samoe.moe.alltoall_dispatcher import AllToAllDispatcher
from megatron_samoe.ops.asynchronous import taken_for_gpu
from megatron_samoe.optimizer import mixed_precision
from megatron_samoe.optimizer.mixed_precision import LossScale, MixedPrecisionOptimizer
from megatron_samoe.parallel_state import RankGrid
from megatron_samoe.parallel_state.state import Group, PendingShift, planned_state
from megatron_samoe.pipeline_parallel.schedules import Pipeline
from megatron_samoe.planning.memory import rank_memory
from megatron_samoe.row_exchange import all_to_all
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


def _exchange(x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], group: Group) -> Tensor:
    return x.new_empty((sum(receive_rows), *x.shape[1:]))


def _piece(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """What flash attention leaves of a piece."""
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _piece_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _shift(group: Group, x: Tensor) -> PendingShift:
    return PendingShift(group, torch.empty_like(x), x, ())


def _reduce_scatter(group: Group, x: Tensor) -> Tensor:
    return x if group.size == 1 else x[: len(x) // group.size].clone()


@contextlib.contextmanager
def device_without_storage(rows_for_each_rank_and_expert: int) -> Iterator[None]:
    """`meta` as an H100 of a world that does not exist, where the other ranks send as many rows as this one."""

    def table(dispatcher: AllToAllDispatcher, _copy: object) -> Tensor:
        size = dispatcher.group.size
        return torch.full((2, size, dispatcher.num_experts // size), rows_for_each_rank_and_expert)

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Attention.apply(query, key, value)

    with (
        taken_for_gpu("meta"),
        mock.patch.object(AllToAllDispatcher, "awaited", table),
        mock.patch.object(all_to_all, "_exchange", _exchange),
        mock.patch.object(Group, "all_reduce", lambda group, x, *_: x),
        mock.patch.object(
            Group,
            "all_gather",
            lambda group, x, out=None: x if group.size == 1 else torch.cat([x] * group.size) if out is None else out,
        ),
        mock.patch.object(Group, "reduce_scatter", _reduce_scatter),
        mock.patch.object(Group, "start_reduce_scatter", lambda group, part, x: None),
        mock.patch.object(Group, "all_gather_object", lambda group, value: [value] * group.size),
        mock.patch.object(torch.nn.functional, "rms_norm", lambda x, shape, weight, eps: _RMSNorm.apply(x, weight)),
        mock.patch.object(Group, "start_all_reduce", lambda group, x: None),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention),
        mock.patch.object(ring_attention, "attention_piece", _piece),
        mock.patch.object(ring_attention, "attention_piece_backward", _piece_backward),
        mock.patch.object(Group, "start_shift", _shift),
        mock.patch.object(Group, "all_to_all", lambda group, x: torch.empty_like(x)),
        mock.patch.object(mixed_precision, "_make_adam", lambda *_: SimpleNamespace(state={}, param_groups=[])),
    ):
        yield


def step_peak(config: PretrainConfig, vocab_size: int, world: int) -> tuple[int, int, int]:
    """Returns the measured peak of one rank's step, in bytes, the planned one, and what is held before the step.

    Experts have equally many tokens. The optimizer has its state, and its update is left out; ranks that update slices then
    gather the weights.
    """
    layout = config.parallel
    state = planned_state(RankGrid.of(layout, world), 0, layout.sequence_parallel, layout.cp_comm_type)
    tokens = config.training.micro_batch_size * config.model.seq_length // layout.context_parallel_size
    if state.etp.size < state.tp.size:  # whole experts: each of these ranks sends its share of the tokens
        tokens //= state.tp.size
    num_experts = config.moe.num_experts if config.moe.expert_layout != "dense" else 1
    with device_without_storage(tokens * config.moe.moe_router_topk // num_experts):
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
