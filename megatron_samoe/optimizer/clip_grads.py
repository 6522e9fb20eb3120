"""The global gradient norm, which counts each element once in every layout."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_samoe.distributed.grad_buffer import Piece
from megatron_samoe.parallel_state.state import ParallelState

#: Elements of a row, whose squares fp32 adds up exactly enough.
_ROW = 4096


def global_grad_norm(pieces: Iterable[Piece], state: ParallelState) -> Tensor:
    """Returns the 2-norm of the gradient of all ranks' pieces, a scalar in fp64 on the device.

    All ranks call it together, after the gradients are reduced.
    """
    grads = [piece.grad for piece in pieces if piece.counts and piece.grad.numel()]
    total = torch.zeros((), dtype=torch.float64, device=state.device)
    if grads:
        total += _norms_of_parts(grads).double().square().sum()
    return state.world.all_reduce(total).sqrt()


def _norms_of_parts(grads: list[Tensor]) -> Tensor:
    """Returns the 2-norms of parts that gradients consist of.

    On CPUs torch adds all squares of a tensor to a few fp32 sums, which at 16 M elements are off by 7e-4: there the parts are
    short rows, for the same time.
    """
    norms, rest = [], []
    for grad in grads:
        in_rows = grad.numel() // _ROW * _ROW if grad.device.type == "cpu" else 0
        if in_rows:
            norms.append(torch.linalg.vector_norm(grad.view(-1)[:in_rows].view(-1, _ROW), dim=1))
        if in_rows < grad.numel():
            rest.append(grad.view(-1)[in_rows:])
    return torch.cat([*norms, *(norm.view(1) for norm in torch._foreach_norm(rest))] if rest else norms)


def clip_factor(norm: float, limit: float) -> float:
    """Returns the factor that brings gradients of this norm to the limit, at most 1; a limit of 0 means none."""
    return limit / norm if 0 < limit < norm else 1.0
