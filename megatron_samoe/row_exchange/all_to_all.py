"""Differentiable uneven all-to-all of rows; the backward sends gradients back the same way.

`all_to_all_rows` is an op of torch (megatron_samoe::all_to_all_rows) with a backward and a fake implementation, so that
graphs with exchanges can be traced. An op takes no objects, so a number names the group.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_samoe.ops import extension
from megatron_samoe.ops.permute import Permutation, gather_rows, permute
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange.communicator import check_splits

_next_key = itertools.count(1)
_keys: weakref.WeakKeyDictionary[Group, int] = weakref.WeakKeyDictionary()
_groups: weakref.WeakValueDictionary[int, Group] = weakref.WeakValueDictionary()


def all_to_all_rows(x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], group: Group) -> Tensor:
    """Returns the rows that all members sent here, in group order.

    Args:
        x: [sum(send_rows), ...], rows for member 0 first.
        send_rows: rows for each member.
        receive_rows: rows from each member; equal to the members' send_rows for this rank.

    Raises:
        ValueError: the splits do not fit x or the group; raised before anything is sent.
    """
    if group.size == 1:
        return x
    rows: Tensor = _op()(x, list(send_rows), list(receive_rows), _key(group))
    return rows


def exchange_counts(counts_WE: Tensor, group: Group) -> Tensor:
    """Returns [W, e] counts: row r has what member r sends to this rank. counts_WE[r] is what this rank sends to r."""
    if group.size == 1:
        return counts_WE
    if group.exchange is not None:
        return group.exchange.exchange_evenly(counts_WE)
    return _exchange(counts_WE, [1] * group.size, [1] * group.size, group)


@dataclass(frozen=True)
class Route:
    """The way of rows in one dispatch over a group.

    sent_rows, received_rows: rows for and from each member. order_R: for each received row, sorted by local expert, its
    index in order of arrival; inverse_R: the inverse.
    """

    sent_rows: list[int]
    received_rows: list[int]
    order_R: Tensor
    inverse_R: Tensor


def dispatch_rows(
    x_TH: Tensor, permutation: Permutation, route: Route, group: Group, rows_NH: Tensor | None = None
) -> Tensor:
    """Returns rows_RH: the tokens, permuted, exchanged, and sorted by local expert.

    Rows that go through a communicator are gathered straight into what it sends from.

    Args:
        rows_NH: the permuted tokens, where the caller has them; rows of dropped slots may follow.
    """
    if rows_NH is None and _gathers(group, x_TH):
        rows_RH: Tensor = _DispatchRows.apply(x_TH.contiguous(), permutation, route, group)
        return rows_RH
    if rows_NH is None:
        rows_NH = permute(x_TH, permutation)
    elif len(rows_NH) > permutation.num_rows:
        rows_NH = rows_NH[: permutation.num_rows]
    rows_RH = all_to_all_rows(rows_NH, route.sent_rows, route.received_rows, group)
    return gather_rows(rows_RH, route.order_R, route.inverse_R)


def return_rows(y_RH: Tensor, route: Route, group: Group) -> Tensor:
    """Returns y_NH: the experts' results in the order of the permutation, on the ranks that hold their tokens."""
    if _gathers(group, y_RH):
        y_NH: Tensor = _ReturnRows.apply(y_RH.contiguous(), route, group)
        return y_NH
    arrivals_RH = gather_rows(y_RH, route.inverse_R, route.order_R)
    return all_to_all_rows(arrivals_RH, route.received_rows, route.sent_rows, group)


def _gathers(group: Group, x: Tensor) -> bool:
    return group.exchange is not None and extension.serves(x)


class _DispatchRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, permutation: Permutation, route: Route, group: Group) -> Tensor:
        ctx.handed = permutation, route, group
        assert group.exchange is not None
        arrivals_RH = group.exchange.exchange_gathered(
            x_TH, permutation.slot_of_row_N, permutation.topk, route.sent_rows, route.received_rows
        )
        rows_RH: Tensor = torch.ops.megatron_samoe.permute(arrivals_RH, route.order_R, 1)
        return rows_RH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_RH: Tensor) -> tuple[Tensor, None, None, None]:
        permutation, route, group = ctx.handed
        drows_NH = group.exchange.exchange_gathered(
            drows_RH.contiguous(), route.inverse_R, 1, route.received_rows, route.sent_rows
        )
        dx_TH: Tensor = torch.ops.megatron_samoe.unpermute(drows_NH, None, permutation.row_of_slot_TK)
        return dx_TH, None, None, None


class _ReturnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RH: Tensor, route: Route, group: Group) -> Tensor:
        ctx.handed = route, group
        assert group.exchange is not None
        return group.exchange.exchange_gathered(y_RH, route.inverse_R, 1, route.received_rows, route.sent_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NH: Tensor) -> tuple[Tensor, None, None]:
        route, group = ctx.handed
        arrivals_RH = group.exchange.exchange(dy_NH.contiguous(), route.sent_rows, route.received_rows)
        return torch.ops.megatron_samoe.permute(arrivals_RH, route.order_R, 1), None, None


def _exchange(x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], group: Group) -> Tensor:
    if group.exchange is not None:
        return group.exchange.exchange(x, send_rows, receive_rows)
    check_splits(x, send_rows, receive_rows, group.size)
    return group.all_to_all_uneven(x, send_rows, receive_rows)


def _key(group: Group) -> int:
    """Returns the number by which the op finds the group, as long as the group exists."""
    key = _keys.get(group)
    if key is None or key not in _groups:
        key = _keys[group] = next(_next_key)
        _groups[key] = group
    return key


def group_of(key: int) -> Group:
    """Returns the group that a number of the op means."""
    return _groups[key]


@functools.cache
def _op() -> Any:
    """Registers the op at its first use and returns it."""
    library = torch.library.Library("megatron_samoe", "FRAGMENT")
    library.define("all_to_all_rows(Tensor x, SymInt[] send_rows, SymInt[] receive_rows, int group) -> Tensor")
    library.impl("all_to_all_rows", _impl, "CompositeExplicitAutograd")
    name = "megatron_samoe::all_to_all_rows"
    torch.library.register_fake(name, _fake, lib=library)
    torch.library.register_autograd(name, _backward, setup_context=_setup_context, lib=library)
    _op.library = library  # type: ignore[attr-defined]  # its end would take the op along
    return torch.ops.megatron_samoe.all_to_all_rows.default


def _impl(x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], group: int) -> Tensor:
    return _exchange(x, send_rows, receive_rows, group_of(group))


def _fake(x: Tensor, send_rows: Sequence[Any], receive_rows: Sequence[Any], group: int) -> Tensor:
    return x.new_empty((sum(receive_rows), *x.shape[1:]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x, ctx.send_rows, ctx.receive_rows, key = inputs
    ctx.group = group_of(key)  # lives as long as the graph


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return all_to_all_rows(grad, ctx.receive_rows, ctx.send_rows, ctx.group), None, None, None
