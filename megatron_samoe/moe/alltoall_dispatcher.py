"""Tokens to the ranks that hold their experts, and back: permute, exchange counts, all-to-all, sort by local expert."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from megatron_samoe.ops.permute import Permutation, invert_index, make_permutation, permute, unpermute
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange.all_to_all import Route, dispatch_rows, exchange_counts, return_rows
from megatron_samoe.row_exchange.overlapped_all_to_all import RoundTrip


@dataclass(frozen=True)
class Dispatched:
    """Tokens that this rank's experts work on, and what is needed to send the results back.

    Attributes:
        rows_RH: received tokens, sorted by local expert, then by sender.
        rows_per_expert: e counts that sum to R.
        route: how the rows came; None where they did not travel.
    """

    rows_RH: Tensor
    rows_per_expert: list[int]
    permutation: Permutation
    route: Route | None


@dataclass(frozen=True)
class Dispatching:
    """Tokens on their way to experts, in parts of a few local experts each; use it once, parts in order.

    Attributes:
        rows_per_expert: for each part e counts, zero for experts of other parts.
    """

    rows_per_expert: list[list[int]]
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


class AllToAllDispatcher:
    """Dispatches over an expert-parallel group; a group of one only sorts.

    Args:
        num_chunks: parts of `start`, at most the experts of a rank.
    """

    def __init__(self, num_experts: int, group: Group, num_chunks: int = 1):
        self.num_experts, self.group = num_experts, group
        experts_per_rank = num_experts // group.size
        assert 1 <= num_chunks <= experts_per_rank
        self._local_experts = [
            slice(first, last)
            for first, last in pairwise(experts_per_rank * part // num_chunks for part in range(num_chunks + 1))
        ]
        # Experts in the order of their parts, each part's by rank: then a part's rows lie together.
        experts_We = torch.arange(num_experts).view(group.size, -1)
        self._place_E = invert_index(torch.cat([experts_We[:, part].flatten() for part in self._local_experts]))

    def dispatch(self, x_TH: Tensor, ids_TK: Tensor) -> Dispatched:
        """Sends every token to the experts it chose."""
        permutation = make_permutation(ids_TK, self.num_experts)
        if self.group.size == 1:
            return Dispatched(permute(x_TH, permutation), permutation.counts_E.tolist(), permutation, None)
        send_We = permutation.counts_E.view(self.group.size, -1)
        receive_We = exchange_counts(send_We, self.group)
        # The one place where the host waits for the device: an uneven exchange needs sizes on the host.
        table = torch.stack((send_We, receive_We)).cpu()
        sent, received = (part.sum(1).tolist() for part in table)
        order_R = expert_major_order(table[1]).to(x_TH.device)
        route = Route(sent, received, order_R, invert_index(order_R))
        rows_RH = dispatch_rows(x_TH, permutation, route, self.group)
        return Dispatched(rows_RH, table[1].sum(0).tolist(), permutation, route)

    def start(self, x_TH: Tensor, ids_TK: Tensor) -> Dispatching:
        """As dispatch, in the background; the rows come in `num_chunks` parts."""
        place_E = self._place_E.to(ids_TK.device)
        if len(self._local_experts) > 1:
            ids_TK = torch.where(ids_TK < 0, ids_TK, place_E[ids_TK.clamp(min=0)])
        permutation = make_permutation(ids_TK, self.num_experts)
        send_We = permutation.counts_E[place_E].view(self.group.size, -1)
        table = torch.stack((send_We, exchange_counts(send_We, self.group))).cpu()
        routes, rows_per_expert = [], []
        for experts in self._local_experts:
            sent, received = (part.sum(1).tolist() for part in table[:, :, experts])
            order_R = expert_major_order(table[1, :, experts]).to(x_TH.device)
            routes.append(Route(sent, received, order_R, invert_index(order_R)))
            rows_e = torch.zeros(table.shape[2], dtype=torch.int64)
            rows_e[experts] = table[1, :, experts].sum(0)
            rows_per_expert.append(rows_e.tolist())
        trip = RoundTrip(permutation, routes, self.group)
        return Dispatching(rows_per_expert, trip, trip.start_dispatch(x_TH))

    def combine(self, y_RH: Tensor, probs_TK: Tensor, dispatched: Dispatched) -> Tensor:
        """Returns y_TH: the experts' results back at their tokens, weighted by probs_TK and summed."""
        if dispatched.route is not None:
            y_RH = return_rows(y_RH, dispatched.route, self.group)
        return unpermute(y_RH, probs_TK, dispatched.permutation)


def expert_major_order(counts_We: Tensor) -> Tensor:
    """Returns order_R for rows that arrive by sender, then expert: row r of the result is order_R[r] of the arrivals."""
    lengths = counts_We.flatten()
    starts_We = (lengths.cumsum(0) - lengths).view_as(counts_We)
    lengths_eW = counts_We.t().flatten()
    first = lengths_eW.cumsum(0) - lengths_eW
    shift = starts_We.t().flatten() - first
    return shift.repeat_interleave(lengths_eW) + torch.arange(int(lengths.sum()))
