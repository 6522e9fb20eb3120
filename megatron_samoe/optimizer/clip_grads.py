"""The global gradient norm, which counts each element once in every layout."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_samoe.distributed.grad_buffer import Piece
from megatron_samoe.parallel_state.state import ParallelState


def global_grad_norm(pieces: Iterable[Piece], state: ParallelState) -> Tensor:
    """Returns the 2-norm of the gradient of all ranks' pieces, a scalar in fp64 on the device.

    All ranks call it together, after the gradients are reduced.
    """
    grads = [piece.grad for piece in pieces if piece.counts and piece.grad.numel()]
    total = torch.zeros((), dtype=torch.float64, device=state.device)
    if grads:
        total += torch.stack([norm.double() for norm in torch._foreach_norm(grads)]).square().sum()
    return state.world.all_reduce(total).sqrt()


def clip_factor(norm: float, limit: float) -> float:
    """Returns the factor that brings gradients of this norm to the limit, at most 1; a limit of 0 means none."""
    return limit / norm if 0 < limit < norm else 1.0
