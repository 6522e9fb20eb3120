"""Cross-entropy over logits whose vocabulary is split over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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
        num_tokens, width = logits_TV.shape
        dtype = torch.promote_types(logits_TV.dtype, torch.float32)
        if width:
            peak_T = logits_TV.amax(-1).to(dtype)
        else:
            peak_T = torch.full((num_tokens,), -torch.inf, dtype=dtype, device=logits_TV.device)
        group.all_reduce(peak_T, dist.ReduceOp.MAX)
        probs_TV = logits_TV.to(dtype).sub(peak_T[:, None])
        local_T = labels_T - first_id
        mine_T = (local_T >= 0) & (local_T < width)
        column_T1 = local_T.clamp(0, max(width - 1, 0))[:, None]
        target_T = probs_TV.gather(1, column_T1).squeeze(1) if width else torch.zeros_like(peak_T)
        target_T.masked_fill_(~mine_T, 0.0)
        sum_T = probs_TV.exp_().sum(-1)
        if group.size > 1:
            both = torch.stack((sum_T, target_T))
            sum_T, target_T = group.all_reduce(both).unbind()
        ctx.save_for_backward(probs_TV.div_(sum_T[:, None]), column_T1, mine_T)
        ctx.logits_dtype = logits_TV.dtype
        return sum_T.log() - target_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        probs_TV, column_T1, mine_T = ctx.saved_tensors
        grad_TV = probs_TV * grad_T[:, None]
        if grad_TV.shape[1]:
            grad_TV.scatter_add_(1, column_T1, -(grad_T * mine_T)[:, None])
        return grad_TV.to(ctx.logits_dtype), None, None, None
