"""Uneven all-to-all of rows, differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_samoe.parallel_state.state import Group


def all_to_all_rows(x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], group: Group) -> Tensor:
    """Returns the rows that all members sent here, in group order; the gradient takes the way back.

    Args:
        x: [sum(send_rows), ...], rows for member 0 first.
        send_rows: rows for each member.
        receive_rows: rows from each member, as the others' send_rows say.
    """
    if group.size == 1:
        return x
    return _AllToAll.apply(x, list(send_rows), list(receive_rows), group)


def exchange_counts(counts_WE: Tensor, group: Group) -> Tensor:
    """Returns [W, e]: row r is what member r holds for this rank, where counts_WE[r] is what this rank holds for r."""
    if group.size == 1:
        return counts_WE
    if group.exchange is not None:
        return group.exchange.exchange(counts_WE, [1] * group.size, [1] * group.size)
    received = torch.empty_like(counts_WE)
    dist.all_to_all_single(received, counts_WE.contiguous(), group=group.handle)
    return received


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send_rows: list[int], receive_rows: list[int], group: Group) -> Tensor:
        ctx.splits, ctx.group = (send_rows, receive_rows), group
        return _exchange(x, send_rows, receive_rows, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        send_rows, receive_rows = ctx.splits
        return _exchange(grad, receive_rows, send_rows, ctx.group), None, None, None


def _exchange(x: Tensor, send_rows: list[int], receive_rows: list[int], group: Group) -> Tensor:
    if group.exchange is not None:
        return group.exchange.exchange(x, send_rows, receive_rows)
    received = x.new_empty((sum(receive_rows), *x.shape[1:]))
    dist.all_to_all_single(received, x.contiguous(), receive_rows, send_rows, group=group.handle)
    return received
