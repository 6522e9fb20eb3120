"""Region borders of tensor parallelism: each a communication forwards and its conjugate backwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_samoe.parallel_state.state import Group, ParallelState


def enter_tensor_parallel_region(x_TH: Tensor, state: ParallelState) -> Tensor:
    """Returns all tokens, for a layer whose matrices are split; gradients of the parts are summed.

    With sequence parallelism x holds this rank's share of tokens, and gets its share of the gradient back.
    """
    if state.tp.size == 1:
        return x_TH
    return _GatherPartial.apply(x_TH, state.tp) if state.sequence_parallel else _Copy.apply(x_TH, state.tp)


def leave_tensor_parallel_region(y_TH: Tensor, state: ParallelState) -> Tensor:
    """Returns the sum of all ranks' parts of y: whole, or with sequence parallelism this rank's share of tokens."""
    if state.tp.size == 1:
        return y_TH
    return _ReduceScatter.apply(y_TH, state.tp) if state.sequence_parallel else _Reduce.apply(y_TH, state.tp)


def copy_to_tensor_parallel_region(x: Tensor, group: Group) -> Tensor:
    """Returns x; its gradient is summed over the group."""
    return x if group.size == 1 else _Copy.apply(x, group)


def scatter_tokens(x: Tensor, group: Group) -> Tensor:
    """Returns this rank's share of a replicated x along dim 0; gradients are gathered."""
    return x if group.size == 1 else _Scatter.apply(x, group)


def gather_tokens(x: Tensor, group: Group) -> Tensor:
    """Returns all ranks' x along dim 0; each rank's gradient is its own share of a replicated one."""
    return x if group.size == 1 else _Gather.apply(x, group)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.group.all_reduce(grad.clone(memory_format=torch.contiguous_format)), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.all_reduce(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        assert x.shape[0] % group.size == 0, f"{x.shape[0]} tokens do not divide over {group.size} ranks"
        ctx.group = group
        return x.chunk(group.size)[group.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.group.all_gather(grad), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.chunk(ctx.group.size)[ctx.group.rank].contiguous(), None


class _GatherPartial(torch.autograd.Function):
    """Gather, for users of the result that each give only a part of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.group.reduce_scatter(grad), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.reduce_scatter(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.group.all_gather(grad), None
