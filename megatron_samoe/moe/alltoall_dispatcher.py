"""Tokens to the ranks that hold their experts, and back: permute, exchange counts, all-to-all, sort by local expert.

Counts stay on the device of the tokens. Only sizes of messages between ranks are needed on the host: the one copy of a
dispatch brings them there behind other work (`Leaving`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from megatron_samoe.ops.asynchronous import HostCopy, runs_behind_host
from megatron_samoe.ops.grouped_mlp import Counts
from megatron_samoe.ops.grouped_products import ExpertRows
from megatron_samoe.ops.permute import Permutation, invert_index, make_permutation, permute, unpermute
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange.all_to_all import Route, dispatch_rows, exchange_counts, return_rows
from megatron_samoe.row_exchange.overlapped_all_to_all import RoundTrip


@dataclass(frozen=True)
class Dispatched:
    """Tokens that this rank's experts work on, and what is needed to send the results back.

    Attributes:
        rows_RH: received tokens, sorted by local expert, then by sender.
        rows_per_expert: of e experts, on the device; see `ops.grouped_mlp`.
        route: how the rows came; None where they did not travel.
    """

    rows_RH: Tensor
    rows_per_expert: Counts
    permutation: Permutation
    route: Route | None


@dataclass(frozen=True)
class Dispatching:
    """Tokens on their way to experts, in parts of a few local experts each; use it once, parts in order.

    Attributes:
        rows_per_expert: for each part e counts, zero for experts of other parts.
    """

    rows_per_expert: list[Tensor]
    _trip: RoundTrip
    _on_their_way: list[Tensor]
    _on_their_way_back: list[Tensor] = field(default_factory=list)

    def arrive(self, part: int) -> Tensor:
        """Returns rows_RH of a part, sorted by local expert, when they are there."""
        return self._trip.arrive(part, self._on_their_way[part])

    def send_back(self, part: int, y_RH: Tensor) -> None:
        """Starts sending the results of a part to their tokens."""
        self._on_their_way_back.append(self._trip.start_return(part, y_RH))

    def combine(self, probs_TK: Tensor) -> Tensor:
        """Returns y_TH as AllToAllDispatcher.combine, when all results are back."""
        return unpermute(self._trip.finish_return(self._on_their_way_back), probs_TK, self._trip.permutation)


@dataclass(frozen=True)
class Leaving:
    """Tokens whose experts are chosen, while the sizes of messages are on their way to the host.

    Attributes:
        rows_NH: the tokens in the permutation's order, where they were permuted already.
        receive_We: rows from each member for each local expert.
        table: what this rank sends and receives, [2, W, e]; None where tokens do not travel.
    """

    x_TH: Tensor
    permutation: Permutation
    rows_NH: Tensor | None = None
    receive_We: Tensor | None = None
    table: HostCopy | None = None


class AllToAllDispatcher:
    """Dispatches over an expert-parallel group; a group of one only sorts.

    Args:
        num_chunks: parts of `start`, at most the experts of a rank.
        few_choices: whether most of a token's choices are none; then sorting alone asks for the number of rows.
    """

    def __init__(self, num_experts: int, group: Group, num_chunks: int = 1, few_choices: bool = False):
        self.num_experts, self.group, self._few_choices = num_experts, group, few_choices
        experts_per_rank = num_experts // group.size
        assert 1 <= num_chunks <= experts_per_rank
        self._local_experts = [
            slice(first, last)
            for first, last in pairwise(experts_per_rank * part // num_chunks for part in range(num_chunks + 1))
        ]
        # Experts in the order of their parts, each part's by rank: then a part's rows lie together.
        experts_We = torch.arange(num_experts).view(group.size, -1)
        self._place_E = invert_index(torch.cat([experts_We[:, part].flatten() for part in self._local_experts]))

    def leave(self, x_TH: Tensor, ids_TK: Tensor) -> Leaving:
        """Sorts tokens by the experts they chose and asks the other ranks what will come."""
        permutation = make_permutation(ids_TK, self.num_experts)
        if self.group.size == 1:
            if self._few_choices and runs_behind_host(ids_TK.device):
                permutation = permutation.kept(int(permutation.counts_E.sum()))
            return Leaving(x_TH, permutation)
        receive_We, table = self._exchange_counts(permutation.counts_E)
        # What comes before the wait for the sizes hides it.
        rows_NH = permute(x_TH, permutation) if runs_behind_host(x_TH.device) else None
        return Leaving(x_TH, permutation, rows_NH, receive_We, table)

    def dispatch(self, leaving: Leaving) -> Dispatched:
        """Sends every token to the experts it chose."""
        permutation, receive_We = leaving.permutation, leaving.receive_We
        if leaving.table is None or receive_We is None:
            rows_RH, counts_E = permute(leaving.x_TH, permutation), permutation.counts_E
            if not runs_behind_host(rows_RH.device):
                return Dispatched(rows_RH, counts_E, permutation, None)
            return Dispatched(rows_RH, ExpertRows(counts_E, len(rows_RH), permutation.ends_E), permutation, None)
        table = self._awaited(leaving.table)
        route = _route(table, receive_We)
        permutation = permutation.kept(sum(route.sent_rows))
        rows_RH = dispatch_rows(leaving.x_TH, permutation, route, self.group, leaving.rows_NH)
        return Dispatched(rows_RH, receive_We.sum(0), permutation, route)

    def start(self, x_TH: Tensor, ids_TK: Tensor) -> Dispatching:
        """As leave and dispatch, in the background; the rows come in `num_chunks` parts."""
        if self._place_E.device != ids_TK.device:
            self._place_E = self._place_E.to(ids_TK.device)
        place_E = self._place_E
        if len(self._local_experts) > 1:
            ids_TK = torch.where(ids_TK < 0, ids_TK, place_E[ids_TK.clamp(min=0)])
        permutation = make_permutation(ids_TK, self.num_experts)
        receive_We, copy = self._exchange_counts(permutation.counts_E[place_E])
        table = self._awaited(copy)
        rows_e = receive_We.sum(0)
        routes, rows_per_expert = [], []
        for experts in self._local_experts:
            routes.append(_route(table[:, :, experts], receive_We[:, experts]))
            part_e = torch.zeros_like(rows_e)
            part_e[experts] = rows_e[experts]
            rows_per_expert.append(part_e)
        num_rows = sum(sum(route.sent_rows) for route in routes)
        trip = RoundTrip(permutation.kept(num_rows), routes, self.group)
        return Dispatching(rows_per_expert, trip, trip.start_dispatch(x_TH))

    def _exchange_counts(self, counts_E: Tensor) -> tuple[Tensor, HostCopy]:
        """Returns rows from each member for each local expert, and what this rank sends and receives as it comes to the
        host.
        """
        send_We = counts_E.view(self.group.size, -1)
        receive_We = exchange_counts(send_We, self.group)
        return receive_We, HostCopy(torch.stack((send_We, receive_We)))

    def _awaited(self, copy: HostCopy) -> Tensor:
        """Returns what a copy brings: the one place where the host waits for the device."""
        table = copy.wait()
        if self.group.exchange is not None:
            self.group.exchange.check()  # counts of an exchange that was aborted are no counts
        return table

    def combine(self, y_RH: Tensor, probs_TK: Tensor, dispatched: Dispatched) -> Tensor:
        """Returns y_TH: the experts' results back at their tokens, weighted by probs_TK and summed."""
        if dispatched.route is not None:
            y_RH = return_rows(y_RH, dispatched.route, self.group)
        return unpermute(y_RH, probs_TK, dispatched.permutation)


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
