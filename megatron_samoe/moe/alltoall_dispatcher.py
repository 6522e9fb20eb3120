"""Tokens to the ranks that hold their experts, and back: permute, exchange counts, all-to-all, sort by local expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_samoe.ops.all_to_all import Route, dispatch_rows, exchange_counts, return_rows
from megatron_samoe.ops.permute import Permutation, invert_index, make_permutation, permute, unpermute
from megatron_samoe.parallel_state.state import Group


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


class AllToAllDispatcher:
    """Dispatches over an expert-parallel group; a group of one only sorts."""

    def __init__(self, num_experts: int, group: Group):
        self.num_experts, self.group = num_experts, group

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
