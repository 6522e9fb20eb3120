"""The permutation of tokens into expert-major rows and back.

A slot is one choice of one token: slot = t * K + k. A row is a kept slot's position in expert-major order.

How many slots are kept is a number of the device. Where the host would have to wait for it (`asynchronous`), every slot
has a row: those of dropped slots are last, are computed with the last expert's and read by nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_samoe.ops import extension, reference, rows_by_gather
from megatron_samoe.ops.asynchronous import runs_behind_host


@dataclass(frozen=True)
class Permutation:
    """The row of each slot. Rows are sorted by expert, and within an expert by slot; dropped slots have no row, or the last.

    slot_of_row_N: int64. row_of_slot_TK: int64, -1 where the slot is dropped. counts_E: kept rows per expert, int64.
    ends_E: where each expert's rows end, int32; the last's with those of dropped slots.
    """

    slot_of_row_N: Tensor
    row_of_slot_TK: Tensor
    counts_E: Tensor
    ends_E: Tensor

    @property
    def num_rows(self) -> int:
        return self.slot_of_row_N.shape[0]

    @property
    def topk(self) -> int:
        return self.row_of_slot_TK.shape[1]

    def kept(self, num_rows: int) -> Permutation:
        """Returns the permutation without rows of dropped slots, for a caller that knows how many are kept."""
        return replace(self, slot_of_row_N=self.slot_of_row_N[:num_rows], ends_E=self.ends_E.clamp_max(num_rows))


def make_permutation(ids_TK: Tensor, num_experts: int) -> Permutation:
    """Returns the stable expert-major order of the chosen experts' slots; ids of -1 are dropped slots.

    Raises:
        ValueError: ids_TK is not an int64 matrix.
        IndexError (the compiled op: RuntimeError): an id is outside -1..num_experts-1; only where the host can look at it without a wait.
    """
    if ids_TK.dim() != 2 or ids_TK.dtype != torch.int64 or ids_TK.shape[1] == 0:
        raise ValueError(f"ids_TK must be an int64 matrix [T, K >= 1], not {ids_TK.dtype} {tuple(ids_TK.shape)}")
    if extension.serves(ids_TK, cuda="rows"):
        return Permutation(*torch.ops.megatron_samoe.make_permutation(ids_TK.contiguous(), num_experts))
    if runs_behind_host(ids_TK.device):
        return Permutation(*rows_by_gather.make_permutation(ids_TK, num_experts))
    if ids_TK.numel():
        low, high = torch.aminmax(ids_TK)
        if int(low) < -1 or int(high) >= num_experts:
            raise IndexError(f"expert ids go from {int(low)} to {int(high)}; allowed are -1 to {num_experts - 1}")
    return Permutation(*reference.make_permutation(ids_TK, num_experts))


def row_ops(*tensors: Tensor) -> Any:
    """Returns permute, unpermute and unpermute_backward for these tensors, which autograd does not record: compiled ones, or
    those of `rows_by_gather`.
    """
    return torch.ops.megatron_samoe if extension.serves(*tensors, cuda="rows") else rows_by_gather


def _ops(*tensors: Tensor) -> Any:
    """Returns the row ops for these tensors; None where autograd goes through the references."""
    ops = row_ops(*tensors)
    return None if ops is rows_by_gather and not runs_behind_host(tensors[0].device) else ops


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, slot_of_row_N: Tensor, row_of_slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_slot_TK)
        rows_NH: Tensor = _ops(x_TH).permute(x_TH, slot_of_row_N, row_of_slot_TK.shape[1])
        return rows_NH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows_NH: Tensor) -> tuple[Tensor, None, None]:
        (row_of_slot_TK,) = ctx.saved_tensors
        return _ops(drows_NH).unpermute(drows_NH.contiguous(), None, row_of_slot_TK), None, None


def permute(x_TH: Tensor, permutation: Permutation) -> Tensor:
    """Returns rows_NH, the tokens copied into expert-major order; its backward sums a token's rows.

    Raises:
        ValueError: x_TH does not have the permutation's tokens.
    """
    if x_TH.dim() != 2 or x_TH.shape[0] != permutation.row_of_slot_TK.shape[0]:
        raise ValueError(
            f"x_TH is {tuple(x_TH.shape)} and the permutation has {permutation.row_of_slot_TK.shape[0]} tokens"
        )
    if _ops(x_TH) is not None:
        rows_NH: Tensor = _Permute.apply(x_TH.contiguous(), permutation.slot_of_row_N, permutation.row_of_slot_TK)
        return rows_NH
    return reference.permute(x_TH, permutation.slot_of_row_N, permutation.topk)


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NH: Tensor, probs_TK: Tensor, slot_of_row_N: Tensor, row_of_slot_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_NH, probs_TK, slot_of_row_N, row_of_slot_TK)
        y_TH: Tensor = _ops(rows_NH, probs_TK).unpermute(rows_NH, probs_TK, row_of_slot_TK)
        return y_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_NH, probs_TK, *indices = ctx.saved_tensors
        backward = _ops(rows_NH, probs_TK).unpermute_backward
        drows_NH, dprobs_TK = backward(dy_TH.contiguous(), rows_NH, probs_TK, *indices)
        return drows_NH, dprobs_TK, None, None


def unpermute(rows_NH: Tensor, probs_TK: Tensor, permutation: Permutation) -> Tensor:
    """Returns y_TH in the rows' dtype: y[t] = sum over k of probs[t, k] * rows[row_of_slot[t, k]], accumulated in fp32.

    A dropped slot adds nothing, and its probability gets gradient 0.

    Raises:
        ValueError: the shapes do not fit the permutation.
    """
    if rows_NH.dim() != 2 or rows_NH.shape[0] != permutation.num_rows:
        raise ValueError(f"rows_NH is {tuple(rows_NH.shape)} and the permutation has {permutation.num_rows} rows")
    if probs_TK.shape != permutation.row_of_slot_TK.shape:
        raise ValueError(f"probs_TK is {tuple(probs_TK.shape)}, not {tuple(permutation.row_of_slot_TK.shape)}")
    if _ops(rows_NH, probs_TK) is not None:
        probs_TK = probs_TK.to(extension.accumulation_dtype(rows_NH.dtype)).contiguous()
        y_TH: Tensor = _Unpermute.apply(
            rows_NH.contiguous(), probs_TK, permutation.slot_of_row_N, permutation.row_of_slot_TK
        )
        return y_TH
    return reference.unpermute(rows_NH, probs_TK, permutation.slot_of_row_N)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RH: Tensor, index_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        y_RH: Tensor = _ops(x_RH).permute(x_RH, index_R, 1)
        return y_RH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RH: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return _ops(dy_RH).permute(dy_RH.contiguous(), inverse_R, 1), None, None


def invert_index(index_R: Tensor) -> Tensor:
    """Returns the inverse of a bijection of 0..R-1: inverse[index[r]] = r."""
    inverse_R = torch.empty_like(index_R)
    inverse_R[index_R] = torch.arange(index_R.numel(), device=index_R.device, dtype=index_R.dtype)
    return inverse_R


def gather_rows(x_RH: Tensor, index_R: Tensor, inverse_R: Tensor | None = None) -> Tensor:
    """Returns y_RH with y[r] = x[index[r]], for an index that is a bijection; its backward gathers by the inverse.

    Args:
        inverse_R: `invert_index(index_R)`, if the caller has computed that already; `gather_rows(y, inverse_R)` undoes the op.

    Raises:
        ValueError: the index does not have one int64 entry a row.
    """
    if x_RH.dim() != 2 or index_R.shape != x_RH.shape[:1] or index_R.dtype != torch.int64:
        raise ValueError(
            f"index_R is {index_R.dtype} {tuple(index_R.shape)} for rows {tuple(x_RH.shape)}: one int64 a row"
        )
    if _ops(x_RH, index_R) is not None:
        inverse_R = invert_index(index_R) if inverse_R is None else inverse_R
        y_RH: Tensor = _GatherRows.apply(x_RH.contiguous(), index_R.contiguous(), inverse_R.contiguous())
        return y_RH
    return reference.gather_rows(x_RH, index_R)
