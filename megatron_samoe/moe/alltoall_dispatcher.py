"""Tokens to the ranks that hold their experts, and back: permute, exchange counts, all-to-all, sort by local expert.

Counts stay on the device of the tokens. Only sizes of messages between ranks are needed on the host: the one copy of a
dispatch brings them there behind other work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from megatron_samoe.moe.types import Experts
from megatron_samoe.ops.asynchronous import HostCopy, runs_behind_host
from megatron_samoe.ops.grouped_mlp import Counts
from megatron_samoe.ops.grouped_products import ExpertRows
from megatron_samoe.ops.permute import Permutation, invert_index, make_permutation, permute, unpermute
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange.all_to_all import Route, dispatch_rows, exchange_counts, return_rows
from megatron_samoe.row_exchange.overlapped_all_to_all import RoundTrip


class Trip(Protocol):
    """Tokens on their way to the experts that they chose. What is computed before `through` hides the way."""

    def through(self, experts: Experts, probs_TK: Tensor) -> Tensor:
        """Returns y_TH: what experts make of the tokens, back at these, weighted by probs_TK and summed."""
        ...


@dataclass(frozen=True)
class _Stay:
    """Tokens of a group of one, which are only sorted."""

    x_TH: Tensor
    permutation: Permutation

    def through(self, experts: Experts, probs_TK: Tensor) -> Tensor:
        rows_RH = permute(self.x_TH, self.permutation)
        counts: Counts = self.permutation.counts_E
        if runs_behind_host(rows_RH.device):
            counts = ExpertRows(self.permutation.counts_E, len(rows_RH), self.permutation.ends_E)
        return unpermute(experts(rows_RH, counts), probs_TK, self.permutation)


@dataclass(frozen=True)
class _WholeTrip:
    """All tokens in one exchange.

    Attributes:
        rows_NH: the tokens in the permutation's order, where they were permuted already.
        receive_We: rows from each member for each local expert.
        table: what this rank sends and receives, [2, W, e].
    """

    dispatcher: AllToAllDispatcher
    x_TH: Tensor
    permutation: Permutation
    rows_NH: Tensor | None
    receive_We: Tensor
    table: HostCopy

    def through(self, experts: Experts, probs_TK: Tensor) -> Tensor:
        group, route = self.dispatcher.group, _route(self.dispatcher.awaited(self.table), self.receive_We)
        permutation = self.permutation.kept(sum(route.sent_rows))
        rows_RH = dispatch_rows(self.x_TH, permutation, route, group, self.rows_NH)
        y_RH = experts(rows_RH, self.receive_We.sum(0))
        return unpermute(return_rows(y_RH, route, group), probs_TK, permutation)


@dataclass(frozen=True)
class _TripInParts:
    """Tokens in parts of a few local experts each, one part behind the experts of another; for one use.

    Attributes:
        rows_per_expert: for each part e counts, zero for experts of other parts.
    """

    rows_per_expert: Sequence[Tensor]
    trip: RoundTrip
    on_their_way: Sequence[Tensor]

    def through(self, experts: Experts, probs_TK: Tensor) -> Tensor:
        returning = []
        for part, (rows_per_expert, started) in enumerate(zip(self.rows_per_expert, self.on_their_way, strict=True)):
            y_RH = experts(self.trip.arrive(part, started), rows_per_expert)
            returning.append(self.trip.start_return(part, y_RH))
        return unpermute(self.trip.finish_return(returning), probs_TK, self.trip.permutation)


class AllToAllDispatcher:
    """Dispatches over an expert-parallel group; a group of one only sorts.

    Args:
        num_chunks: parts that travel behind each other's experts, at most the experts of a rank; all in one exchange, which
            nothing hides, if not given.
        sparse_choices: whether most of a token's choices are missing (-1); then only sorting asks for the number of rows.
    """

    def __init__(self, num_experts: int, group: Group, num_chunks: int | None = None, sparse_choices: bool = False):
        self.num_experts, self.group, self._sparse_choices = num_experts, group, sparse_choices
        self._in_parts = num_chunks is not None
        num_chunks, experts_per_rank = num_chunks or 1, num_experts // group.size
        assert 1 <= num_chunks <= experts_per_rank
        self._local_experts = [
            slice(first, last)
            for first, last in pairwise(experts_per_rank * part // num_chunks for part in range(num_chunks + 1))
        ]
        # Experts in the order of their parts, each part's by rank: then a part's rows lie together.
        experts_We = torch.arange(num_experts).view(group.size, -1)
        self._position_E = invert_index(torch.cat([experts_We[:, part].flatten() for part in self._local_experts]))

    def dispatch(self, x_TH: Tensor, ids_TK: Tensor) -> Trip:
        """Sorts tokens by the experts they chose, asks the other ranks what will come, and lets the tokens go as far as they
        can without the sizes."""
        if self._in_parts:
            return self._start(x_TH, ids_TK)
        permutation = make_permutation(ids_TK, self.num_experts)
        if self.group.size == 1:
            if self._sparse_choices and runs_behind_host(ids_TK.device):
                permutation = permutation.kept(int(permutation.counts_E.sum()))
            return _Stay(x_TH, permutation)
        receive_We, table = self._exchange_counts(permutation.counts_E)
        # What comes before the wait for the sizes hides it.
        rows_NH = permute(x_TH, permutation) if runs_behind_host(x_TH.device) else None
        return _WholeTrip(self, x_TH, permutation, rows_NH, receive_We, table)

    def _start(self, x_TH: Tensor, ids_TK: Tensor) -> Trip:
        """Starts sending all parts."""
        if self._position_E.device != ids_TK.device:
            self._position_E = self._position_E.to(ids_TK.device)
        position_E = self._position_E
        if len(self._local_experts) > 1:
            ids_TK = torch.where(ids_TK < 0, ids_TK, position_E[ids_TK.clamp(min=0)])
        permutation = make_permutation(ids_TK, self.num_experts)
        receive_We, copy = self._exchange_counts(permutation.counts_E[position_E])
        table = self.awaited(copy)
        rows_e = receive_We.sum(0)
        routes, rows_per_expert = [], []
        for experts in self._local_experts:
            routes.append(_route(table[:, :, experts], receive_We[:, experts]))
            part_e = torch.zeros_like(rows_e)
            part_e[experts] = rows_e[experts]
            rows_per_expert.append(part_e)
        num_rows = sum(sum(route.sent_rows) for route in routes)
        trip = RoundTrip(permutation.kept(num_rows), routes, self.group)
        return _TripInParts(rows_per_expert, trip, trip.start_dispatch(x_TH))

    def _exchange_counts(self, counts_E: Tensor) -> tuple[Tensor, HostCopy]:
        """Returns rows from each member for each local expert, and what this rank sends and receives as it comes to the
        host.
        """
        send_We = counts_E.view(self.group.size, -1)
        receive_We = exchange_counts(send_We, self.group)
        return receive_We, HostCopy(torch.stack((send_We, receive_We)))

    def awaited(self, copy: HostCopy) -> Tensor:
        """Returns the content of a copy: only here does the host wait for the device."""
        table = copy.wait()
        if self.group.exchange is not None:
            self.group.exchange.check()  # counts of an aborted exchange are not valid
        return table


def _route(table: Tensor, receive_We: Tensor) -> Route:
    """Returns the way of rows, from what is sent and received, [2, W, e] on the host, and the latter on the device."""
    sent, received = (part.sum(1).tolist() for part in table)
    order_R = expert_major_order(receive_We, sum(received))
    return Route(sent, received, order_R, invert_index(order_R))


def expert_major_order(counts_We: Tensor, num_rows: int) -> Tensor:
    """Returns order_R for rows that arrive by sender, then expert: row r of the result is order_R[r] of the arrivals.

    Args:
        num_rows: the sum of the counts.
    """
    lengths = counts_We.flatten()
    starts_We = (lengths.cumsum(0) - lengths).view_as(counts_We)
    lengths_eW = counts_We.t().flatten()
    first = lengths_eW.cumsum(0) - lengths_eW
    shift = starts_We.t().flatten() - first
    rows_R = torch.arange(num_rows, device=counts_We.device)
    return shift.repeat_interleave(lengths_eW, output_size=num_rows) + rows_R
