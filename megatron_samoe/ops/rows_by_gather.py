"""Permutation and its reverse in plain torch, each result row gathered: no atomics, no sum in another order.

`reference` has the same by `index_add`, which on a GPU adds in an order of its own and wants fp32 copies of all rows.
Rows past the kept ones belong to dropped slots: nothing reads them, and they get no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_samoe.ops.extension import accumulation_dtype


def buckets(ids: Tensor, num_experts: int) -> Tensor:
    """Returns ids with the number of experts instead of -1. Any other id outside is an error; on a device that runs behind
    the host, its assertion.
    """
    experts = torch.arange(-1, num_experts, device=ids.device).remainder_(num_experts + 1)
    return experts.index_select(0, ids.reshape(-1) + 1).view_as(ids)


def make_permutation(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns what `reference.make_permutation` does, with a row for every slot: those of dropped ones come last."""
    ids_S = ids_TK.reshape(-1)
    is_dropped_S = ids_S < 0
    sorted_S, slot_of_row_S = buckets(ids_S, num_experts).sort(stable=True)
    rows_S = torch.arange(ids_S.numel(), device=ids_S.device)
    row_of_slot_S = torch.empty_like(ids_S).scatter_(0, slot_of_row_S, rows_S).masked_fill_(is_dropped_S, -1)
    ends_E = torch.searchsorted(sorted_S, torch.arange(num_experts, device=ids_S.device), right=True)
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    ends_E = ends_E.to(torch.int32)
    ends_E[-1:] = ids_S.numel()
    return slot_of_row_S, row_of_slot_S.view_as(ids_TK), counts_E, ends_E


def permute(x_TH: Tensor, slot_of_row_N: Tensor, topk: int) -> Tensor:
    """Returns rows_NH: row r is a copy of the token that owns its slot."""
    return x_TH.index_select(0, slot_of_row_N if topk == 1 else slot_of_row_N.div(topk, rounding_mode="floor"))


def unpermute(rows_NH: Tensor, probs_TK: Tensor | None, row_of_slot_TK: Tensor) -> Tensor:
    """Returns y_TH in the rows' dtype: for each token the sum of its rows, each times its probability, if there are any."""
    sum_TH = rows_NH.new_zeros(len(row_of_slot_TK), rows_NH.shape[1], dtype=accumulation_dtype(rows_NH.dtype))
    if not len(rows_NH):
        return sum_TH.to(rows_NH.dtype)
    for k, row_T in enumerate(row_of_slot_TK.unbind(1)):
        part_TH = rows_NH.index_select(0, row_T.clamp_min(0)).to(sum_TH.dtype)
        if probs_TK is not None:
            part_TH = part_TH * probs_TK[:, k, None]
        sum_TH += part_TH.masked_fill_(row_T[:, None] < 0, 0.0)
    return sum_TH.to(rows_NH.dtype)


def unpermute_backward(
    dy_TH: Tensor, rows_NH: Tensor, probs_TK: Tensor, slot_of_row_N: Tensor, row_of_slot_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns drows_NH and dprobs_TK."""
    is_kept_TK = row_of_slot_TK >= 0
    prob_of_row_N = (probs_TK * is_kept_TK).view(-1).index_select(0, slot_of_row_N)
    drows_NH = permute(dy_TH, slot_of_row_N, probs_TK.shape[1]) * prob_of_row_N[:, None]
    if not len(rows_NH):
        return drows_NH.to(rows_NH.dtype), torch.zeros_like(probs_TK)
    dy_TH = dy_TH.to(probs_TK.dtype)
    dprobs = [
        (rows_NH.index_select(0, row_T.clamp_min(0)) * dy_TH).sum(1, dtype=probs_TK.dtype)
        for row_T in row_of_slot_TK.unbind(1)
    ]
    return drows_NH.to(rows_NH.dtype), torch.stack(dprobs, 1).masked_fill_(~is_kept_TK, 0.0)
