"""KL(teacher || student) of softmaxes over a part of the vocabulary, without keeping the probabilities.

    KL = sum_v p_v log(p_v / q_v),      p = softmax(teacher / T),  q = softmax(student / T)
    d KL / d student = (q - p) / T

The log-sum-exps of both come first, from which ranks that hold other parts of the vocabulary make those of all of it; then
each part adds its terms, and later makes its gradient from the logits. Some tokens at a time, so that no second [T, V]
exists but the gradient. Plain functions, not recorded by autograd: tensor_parallel/kl_divergence.py puts the ranks'
reductions between them. `ops/reference.py` says what each returns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_samoe.ops.extension import accumulation_dtype

#: Logits that are worked on at a time: on a CPU temporaries stay in its cache, on a GPU launches stay few.
_CPU_CHUNK, _GPU_CHUNK = 1 << 18, 1 << 26


def _check(student_TV: Tensor, teacher_TV: Tensor) -> None:
    if student_TV.dim() != 2 or student_TV.shape != teacher_TV.shape:
        shapes = f"{tuple(student_TV.shape)} and {tuple(teacher_TV.shape)}"
        raise ValueError(f"logits of student and teacher are {shapes}: both must be [T, V]")


def _chunks(logits_TV: Tensor) -> Iterator[slice]:
    """Yields runs of tokens."""
    numel = _CPU_CHUNK if logits_TV.device.type == "cpu" else _GPU_CHUNK
    size = max(1, numel // max(logits_TV.shape[1], 1))
    for start in range(0, len(logits_TV), size):
        yield slice(start, start + size)


@torch.no_grad()
def scaled_logsumexp(logits_TV: Tensor, temperature: float) -> Tensor:
    """Returns lse_T = log sum exp(logits / temperature) in fp32 (fp64 for fp64 logits); -inf where V is 0."""
    dtype = accumulation_dtype(logits_TV.dtype)
    lse_T = logits_TV.new_empty(len(logits_TV), dtype=dtype)
    for rows in _chunks(logits_TV):
        lse_T[rows] = (logits_TV[rows].to(dtype) / temperature).logsumexp(dim=1)
    return lse_T


@torch.no_grad()
def kl_divergence_terms(
    student_TV: Tensor, teacher_TV: Tensor, student_lse_T: Tensor, teacher_lse_T: Tensor, temperature: float
) -> Tensor:
    """Returns this part's share of KL_T, in the log-sum-exps' dtype.

    Args:
        student_TV, teacher_TV: columns of the vocabulary, the same in both; fp32, bf16, fp16 or fp64.
        student_lse_T, teacher_lse_T: of the full vocabulary at this temperature.

    Errors: ValueError where the shapes differ.
    """
    _check(student_TV, teacher_TV)
    kl_T = torch.zeros_like(student_lse_T)
    for rows in _chunks(student_TV):
        log_q = (student_TV[rows].to(kl_T.dtype) / temperature).sub_(student_lse_T[rows, None])
        log_p = (teacher_TV[rows].to(kl_T.dtype) / temperature).sub_(teacher_lse_T[rows, None])
        p = log_p.exp()
        terms = log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0.0)
        kl_T[rows] = terms.add_(log_q.exp_().sub_(p)).sum(dim=1)
    return kl_T


@torch.no_grad()
def kl_divergence_backward(
    student_TV: Tensor,
    teacher_TV: Tensor,
    student_lse_T: Tensor,
    teacher_lse_T: Tensor,
    temperature: float,
    dkl_T: Tensor,
) -> Tensor:
    """Returns dstudent_TV = (q - p) dkl / temperature in the student's dtype.

    Args:
        student_TV ... temperature: as in `kl_divergence_terms`.
        dkl_T: gradient of each token's KL.

    Errors: ValueError where the shapes differ.
    """
    _check(student_TV, teacher_TV)
    dstudent_TV = torch.empty_like(student_TV)
    for rows in _chunks(student_TV):
        q = (student_TV[rows].to(dkl_T.dtype) / temperature).sub_(student_lse_T[rows, None]).exp_()
        p = (teacher_TV[rows].to(dkl_T.dtype) / temperature).sub_(teacher_lse_T[rows, None]).exp_()
        dstudent_TV[rows] = q.sub_(p).mul_(dkl_T[rows, None] / temperature)
    return dstudent_TV
