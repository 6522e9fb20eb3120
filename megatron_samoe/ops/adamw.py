"""One AdamW step over many slices in one pass: masters, moments, and bf16 weights that follow their masters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_samoe.ops import extension, reference


@dataclass(frozen=True)
class AdamWRates:
    """The hyper-parameters of a step; `grad_scale` multiplies the gradients as they are read."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_scale: float = 1.0


@dataclass(frozen=True)
class AdamWRun:
    """A slice of elements that are updated together, in memory order; all its tensors have equally many.

    Attributes:
        master: fp32 (or fp64, without the extension).
        weight: bf16 weights to set to the master, or None where the master is the weight.
        grad, exp_avg, exp_avg_sq: in the master's dtype.
    """

    master: Tensor
    weight: Tensor | None
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@torch.no_grad()
def adamw(runs: Sequence[AdamWRun], rates: AdamWRates, step: int) -> None:
    """Updates all slices in place, as torch.optim.AdamW does (Loshchilov and Hutter, arXiv:1711.05101).

    Args:
        step: number of the step, 1 for the first.
    """
    numbers = (rates.lr, rates.beta1, rates.beta2, rates.eps, rates.weight_decay, step, rates.grad_scale)
    if not serves(runs):
        for run in runs:
            reference.adamw(run.master, run.grad, run.exp_avg, run.exp_avg_sq, *numbers)
            if run.weight is not None:
                run.weight.copy_(run.master)
        return
    for followed in (False, True):
        part = [run for run in runs if (run.weight is not None) == followed]
        if part:
            torch.ops.megatron_samoe.adamw(
                [run.master for run in part],
                [run.weight for run in part] if followed else [],
                [run.grad for run in part],
                [run.exp_avg for run in part],
                [run.exp_avg_sq for run in part],
                *numbers,
            )


def serves(runs: Sequence[AdamWRun]) -> bool:
    """Returns whether the compiled op takes these slices: fp32 on a CPU, bf16 weights, contiguous."""
    if not all(_fits(run) for run in runs):
        return False
    tensors = (t for run in runs for t in (run.master, run.weight, run.grad, run.exp_avg, run.exp_avg_sq))
    return extension.serves(*tensors)


def _fits(run: AdamWRun) -> bool:
    tensors = (run.master, run.grad, run.exp_avg, run.exp_avg_sq)
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in tensors):
        return False
    return run.weight is None or (run.weight.dtype == torch.bfloat16 and run.weight.is_contiguous())
