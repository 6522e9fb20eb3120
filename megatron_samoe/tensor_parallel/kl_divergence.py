"""KL divergence of two predictions whose vocabulary is split over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_samoe.ops.kl_divergence import kl_divergence_backward, kl_divergence_terms, scaled_logsumexp
from megatron_samoe.parallel_state.state import Group


def vocab_parallel_kl_divergence(student_TV: Tensor, teacher_TV: Tensor, temperature: float, group: Group) -> Tensor:
    """Returns kl_T = KL(softmax(teacher / temperature) || softmax(student / temperature)) over the full vocabulary, in
    fp32 (fp64 for fp64 logits); only the student gets a gradient.

    Three numbers a token are reduced over ranks, never logits.

    Args:
        student_TV, teacher_TV: this rank's part of the vocabulary, the same of both; parts may differ in width, even be
            empty.
        group: the ranks that hold the parts.
    """
    return _KLDivergence.apply(student_TV, teacher_TV, temperature, group)


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student_TV: Tensor, teacher_TV: Tensor, temperature: float, group: Group
    ) -> Tensor:
        lse_2T = torch.stack([scaled_logsumexp(logits_TV, temperature) for logits_TV in (student_TV, teacher_TV)])
        if group.size > 1:
            peak_2T = group.all_reduce(lse_2T.clone(), dist.ReduceOp.MAX)
            lse_2T = group.all_reduce((lse_2T - peak_2T).exp_()).log_().add_(peak_2T)
        kl_T = kl_divergence_terms(student_TV, teacher_TV, lse_2T[0], lse_2T[1], temperature)
        ctx.save_for_backward(student_TV, teacher_TV, lse_2T)
        ctx.temperature = temperature
        return group.all_reduce(kl_T) if group.size > 1 else kl_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        student_TV, teacher_TV, lse_2T = ctx.saved_tensors
        arguments = (student_TV, teacher_TV, lse_2T[0], lse_2T[1], ctx.temperature, grad_T)
        return kl_divergence_backward(*arguments), None, None, None
