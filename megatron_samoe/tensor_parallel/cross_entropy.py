"""Cross-entropy over logits whose vocabulary is split over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_samoe.ops.cross_entropy import cross_entropy_backward, cross_entropy_parts
from megatron_samoe.parallel_state.state import Group


def vocab_parallel_cross_entropy(logits_TV: Tensor, labels_T: Tensor, first_id: int, group: Group) -> Tensor:
    """Returns loss_T in fp32 (fp64 for fp64 logits): -log softmax(logits)[label] over the whole vocabulary.

    Args:
        logits_TV: this rank's part of the vocabulary; parts may differ in width, even be empty.
        labels_T: ids in the whole vocabulary.
        first_id: id of this rank's first column.
        group: the ranks that hold the parts.
    """
    return _CrossEntropy.apply(logits_TV, labels_T, first_id, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, first_id: int, group: Group) -> Tensor:
        peak_T, sum_T, target_T = cross_entropy_parts(logits_TV, labels_T, first_id)
        if group.size > 1:
            global_peak_T = group.all_reduce(peak_T.clone(), dist.ReduceOp.MAX)
            both = torch.stack((sum_T * (peak_T - global_peak_T).exp(), target_T))
            sum_T, target_T = group.all_reduce(both).unbind()
            peak_T = global_peak_T
        log_sum_T = sum_T.log()
        ctx.save_for_backward(logits_TV, labels_T, log_sum_T + peak_T)
        ctx.first_id = first_id
        # The difference of two logits first: the loss must not lose digits to their common size.
        return log_sum_T - (target_T - peak_T)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        logits_TV, labels_T, logsumexp_T = ctx.saved_tensors
        return cross_entropy_backward(logits_TV, labels_T, ctx.first_id, logsumexp_T, grad_T), None, None, None
