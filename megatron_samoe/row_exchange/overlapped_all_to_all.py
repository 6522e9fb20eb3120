"""A dispatch in parts, with each exchange in the background of other parts' computation.

A part's exchange starts at one node of autograd's graph and is awaited at another. Autograd visits nodes in the reverse
order of their making. So the computation between the two nodes in the forward (the experts of another part, or the
shared expert) is also between the reverse exchange's start and end in the backward. Dummy scalars join nodes that
only wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_samoe.ops import extension
from megatron_samoe.ops.permute import Permutation, gather_rows, row_ops
from megatron_samoe.parallel_state.state import Group, PendingRows
from megatron_samoe.row_exchange.all_to_all import Route
from megatron_samoe.row_exchange.communicator import check_splits


class RoundTrip:
    """One dispatch of tokens and the return of the results, in parts.

    Args:
        permutation: of the tokens, with rows sorted by part first.
        routes: of each part; every member of the group has equally many.
    """

    def __init__(self, permutation: Permutation, routes: Sequence[Route], group: Group):
        self.permutation, self.routes, self.group = permutation, routes, group
        ends = list(accumulate((sum(route.sent_rows) for route in routes), initial=0))
        assert ends[-1] == permutation.num_rows
        self.slices_of_N = [slice(first, last) for first, last in pairwise(ends)]
        # Exchanges under way, by part: the dispatch and the return, and the gradients of each.
        self.out: dict[int, PendingRows] = {}
        self.back: dict[int, PendingRows] = {}
        self.out_grads: dict[int, PendingRows] = {}
        self.back_grads: dict[int, PendingRows] = {}
        self.y_NH: Tensor | None = None
        self.drows_NH: Tensor | None = None

    def start_dispatch(self, x_TH: Tensor) -> list[Tensor]:
        """Starts sending the tokens, part by part; returns a handle for `arrive` for each part."""
        return list(_StartDispatch.apply(x_TH.contiguous(), self))

    def arrive(self, part: int, started: Tensor) -> Tensor:
        """Waits for rows_RH of a part and returns them, sorted by local expert."""
        rows_RH: Tensor = _Arrive.apply(started, self, part)
        return rows_RH

    def start_return(self, part: int, y_RH: Tensor) -> Tensor:
        """Starts sending the results of a part back; returns a handle for `finish_return`."""
        started: Tensor = _StartReturn.apply(y_RH.contiguous(), self, part)
        return started

    def finish_return(self, started: Sequence[Tensor]) -> Tensor:
        """Returns y_NH, the results of all parts in the order of the permutation."""
        y_NH: Tensor = _FinishReturn.apply(self, *started)
        return y_NH

    def start_back(self, part: int, rows_RH: Tensor, all_NH: Tensor | None) -> tuple[Tensor, PendingRows]:
        """Starts sending rows of a part back to their position among all rows, which are made at the first part; returns both."""
        if all_NH is None:
            all_NH = rows_RH.new_empty((self.permutation.num_rows, rows_RH.shape[1]))
        route, out = self.routes[part], all_NH[self.slices_of_N[part]]
        return all_NH, _start_gathered(
            rows_RH, route.inverse_R, 1, route.received_rows, route.sent_rows, self.group, out
        )


class _StartDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, trip: RoundTrip) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.trip, ctx.num_tokens = trip, x_TH.shape[0]
        slots_N, topk = trip.permutation.slot_of_row_N, trip.permutation.topk
        for part, (route, rows) in enumerate(zip(trip.routes, trip.slices_of_N, strict=True)):
            trip.out[part] = _start_gathered(
                x_TH, slots_N[rows], topk, route.sent_rows, route.received_rows, trip.group, None
            )
        return tuple(x_TH.new_zeros(()) for _ in trip.routes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        trip = ctx.trip
        for part in reversed(range(len(trip.routes))):
            trip.out_grads.pop(part).wait()
        drows_NH, trip.drows_NH = trip.drows_NH, None
        return row_ops(drows_NH).unpermute(drows_NH, None, trip.permutation.row_of_slot_TK), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, started: Tensor, trip: RoundTrip, part: int) -> Tensor:  # type: ignore[override]
        ctx.trip, ctx.part = trip, part
        route = trip.routes[part]
        return gather_rows(trip.out.pop(part).wait(), route.order_R, route.inverse_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_RH: Tensor) -> tuple[Tensor, None, None]:
        trip, part = ctx.trip, ctx.part
        trip.drows_NH, trip.out_grads[part] = trip.start_back(part, drows_RH.contiguous(), trip.drows_NH)
        return drows_RH.new_zeros(()), None, None


class _StartReturn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RH: Tensor, trip: RoundTrip, part: int) -> Tensor:  # type: ignore[override]
        ctx.trip, ctx.part = trip, part
        trip.y_NH, trip.back[part] = trip.start_back(part, y_RH, trip.y_NH)
        return y_RH.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None]:
        route = ctx.trip.routes[ctx.part]
        arrivals_RH = ctx.trip.back_grads.pop(ctx.part).wait()
        return gather_rows(arrivals_RH, route.order_R, route.inverse_R), None, None


class _FinishReturn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: RoundTrip, *started: Tensor) -> Tensor:  # type: ignore[override]
        ctx.trip = trip
        for part in range(len(trip.routes)):
            trip.back.pop(part).wait()
        y_NH, trip.y_NH = trip.y_NH, None
        assert y_NH is not None
        return y_NH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NH: Tensor) -> tuple[Any, ...]:
        trip, dy_NH = ctx.trip, dy_NH.contiguous()
        for part in reversed(range(len(trip.routes))):  # in the order in which the backward needs them
            route = trip.routes[part]
            rows_NH = dy_NH[trip.slices_of_N[part]]
            trip.back_grads[part] = _start(rows_NH, route.sent_rows, route.received_rows, trip.group, None)
        return None, *(dy_NH.new_zeros(()) for _ in trip.routes)


def _start_gathered(
    x: Tensor,
    index: Tensor,
    divisor: int,
    send_rows: Sequence[int],
    receive_rows: Sequence[int],
    group: Group,
    out: Tensor | None,
) -> PendingRows:
    if group.exchange is not None and extension.serves(x):
        return group.exchange.start_gathered(x, index, divisor, send_rows, receive_rows, out)
    return _start(row_ops(x).permute(x, index, divisor), send_rows, receive_rows, group, out)


def _start(
    x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], group: Group, out: Tensor | None
) -> PendingRows:
    if group.exchange is not None:
        return group.exchange.start(x, send_rows, receive_rows, out)
    check_splits(x, send_rows, receive_rows, group.size)
    received = x.new_empty((sum(receive_rows), *x.shape[1:])) if out is None else out
    work = dist.all_to_all_single(received, x, list(receive_rows), list(send_rows), group=group.handle, async_op=True)
    return PendingRows(received, work.wait)
