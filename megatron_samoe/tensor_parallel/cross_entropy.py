"""Cross-entropy over logits whose vocabulary is split over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_samoe.ops.attention import soft_capped
from megatron_samoe.ops.cross_entropy import cross_entropy_backward, cross_entropy_parts
from megatron_samoe.ops.extension import accumulation_dtype
from megatron_samoe.parallel_state.state import Group

#: Logits that exist at a time in `linear_cross_entropy`.
CHUNK_ELEMENTS = 1 << 24


def vocab_parallel_cross_entropy(logits_TV: Tensor, labels_T: Tensor, first_id: int, group: Group) -> Tensor:
    """Returns loss_T in fp32 (fp64 for fp64 logits): -log softmax(logits)[label] over the full vocabulary.

    Args:
        logits_TV: this rank's part of the vocabulary; parts may differ in width, even be empty.
        labels_T: ids in the full vocabulary.
        first_id: id of this rank's first column.
        group: the ranks that hold the parts.
    """
    return _CrossEntropy.apply(logits_TV, labels_T, first_id, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, first_id: int, group: Group) -> Tensor:
        peak_T, sum_T, target_T = cross_entropy_parts(logits_TV, labels_T, first_id)
        loss_T, logsumexp_T = _joined(peak_T, sum_T, target_T, group)
        ctx.save_for_backward(logits_TV, labels_T, logsumexp_T)
        ctx.first_id = first_id
        return loss_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        logits_TV, labels_T, logsumexp_T = ctx.saved_tensors
        return cross_entropy_backward(logits_TV, labels_T, ctx.first_id, logsumexp_T, grad_T), None, None, None


def _joined(peak_T: Tensor, sum_T: Tensor, target_T: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Returns loss_T and logsumexp_T of the full vocabulary from what `cross_entropy_parts` found in this rank's part."""
    if group.size > 1:
        global_peak_T = group.all_reduce(peak_T.clone(), dist.ReduceOp.MAX)
        both = torch.stack((sum_T * (peak_T - global_peak_T).exp(), target_T))
        sum_T, target_T = group.all_reduce(both).unbind()
        peak_T = global_peak_T
    log_sum_T = sum_T.log()
    # The difference of two logits first: the loss must not lose digits to their common size.
    return log_sum_T - (target_T - peak_T), log_sum_T + peak_T


def linear_cross_entropy(
    x_TH: Tensor, weight_VH: Tensor, num_used: int, labels_T: Tensor, first_id: int, group: Group, softcap: float | None
) -> Tensor:
    """Returns loss_T as `vocab_parallel_cross_entropy` of the logits x W^T, of which only some tokens' exist at a time.

    The backward computes them again, and sums the weight's gradient over tokens in fp32 (fp64).

    Args:
        x_TH: of all tokens, from a tensor-parallel region.
        weight_VH: this rank's rows of the output matrix, maybe none.
        num_used: rows before those of padding, whose logits are -inf.
        softcap: see `soft_capped`.
    """
    return _LinearCrossEntropy.apply(x_TH, weight_VH, num_used, labels_T, first_id, group, softcap)


def chunk_tokens(width: int) -> int:
    """Returns how many tokens' logits of a width exist at a time."""
    return max(CHUNK_ELEMENTS // max(width, 1), 1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        weight_VH: Tensor,
        num_used: int,
        labels_T: Tensor,
        first_id: int,
        group: Group,
        softcap: float | None,
    ) -> Tensor:
        ctx.facts = num_used, first_id, softcap
        found = [
            torch.stack(cross_entropy_parts(_logits(x, weight_VH, num_used, softcap), labels, first_id))
            for x, labels in _chunks(weight_VH, x_TH, labels_T)
        ]
        peak_T, sum_T, target_T = torch.cat(found, 1).unbind()
        loss_T, logsumexp_T = _joined(peak_T, sum_T, target_T, group)
        ctx.save_for_backward(x_TH, weight_VH, labels_T, logsumexp_T)
        return loss_T

    @staticmethod
    def backward(ctx: Any, dloss_T: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_TH, weight_VH, labels_T, logsumexp_T = ctx.saved_tensors
        num_used, first_id, softcap = ctx.facts
        dx_TH, wide = torch.empty_like(x_TH), accumulation_dtype(weight_VH.dtype)
        dweight_VH = torch.zeros_like(weight_VH, dtype=wide)
        parts = _chunks(weight_VH, x_TH, labels_T, logsumexp_T, dloss_T, dx_TH)
        for x, labels, logsumexp, dloss, dx in parts:
            logits = _logits(x, weight_VH, num_used, softcap)
            dlogits = cross_entropy_backward(logits, labels, first_id, logsumexp, dloss)
            if softcap is not None:
                dlogits *= 1 - (logits / softcap).square()
                dlogits[:, num_used:] = 0.0
            torch.mm(dlogits, weight_VH, out=dx)
            dweight_VH += dlogits.t() @ x
        return dx_TH, dweight_VH.to(weight_VH.dtype), *(None,) * 5


def _logits(x_TH: Tensor, weight_VH: Tensor, num_used: int, softcap: float | None) -> Tensor:
    logits_TV = soft_capped(x_TH @ weight_VH.t(), softcap)
    logits_TV[:, num_used:] = -torch.inf
    return logits_TV


def _chunks(weight_VH: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields the tensors' parts of some tokens."""
    return zip(*(t.split(chunk_tokens(len(weight_VH))) for t in tensors), strict=True)
