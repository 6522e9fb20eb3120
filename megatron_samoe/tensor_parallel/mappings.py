"""The borders of tensor- and context-parallel regions: each is a communication forwards and its conjugate backwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.parallel_state.state import Group, ParallelState
from megatron_samoe.parallel_state.token_share import TokenShare, whole_sequences

Communication = Callable[[Tensor, Group], Tensor]


def enter_tensor_parallel_region(x_TH: Tensor, state: ParallelState) -> Tensor:
    """Returns all tokens, for a layer whose matrices are split; the backward sums the ranks' gradients.

    With sequence parallelism x holds this rank's share of tokens, and the backward returns this share of the gradient.
    """
    if state.sequence_parallel:
        return _border(x_TH, state.tp, _all_tokens, _summed_share)
    return copy_to_tensor_parallel_region(x_TH, state.tp)


def leave_tensor_parallel_region(y_TH: Tensor, state: ParallelState) -> Tensor:
    """Returns the sum of all ranks' parts of y: complete, or with sequence parallelism this rank's share of tokens."""
    if state.sequence_parallel:
        return _border(y_TH, state.tp, _summed_share, _all_tokens)
    return _border(y_TH, state.tp, _sum, _same)


def copy_to_tensor_parallel_region(x: Tensor, group: Group) -> Tensor:
    """Returns x; the backward sums its gradient over the group."""
    return _border(x, group, _same, _sum)


def sum_over_tensor_parallel_region(x: Tensor, group: Group) -> Tensor:
    """Returns the sum of all ranks' x, which each of them uses for its own part of a result; the backward sums as well."""
    return _border(x, group, _sum, _sum)


def scatter_tokens(x: Tensor, group: Group) -> Tensor:
    """Returns this rank's share [T / tp, ...] of a replicated x [T, ...]; the backward gathers gradients."""
    return _border(x, group, _share, _all_tokens)


def gather_tokens(x: Tensor, group: Group) -> Tensor:
    """Returns all ranks' x [T / tp, ...] as [T, ...]; the backward takes this rank's share of a replicated gradient."""
    return _border(x, group, _all_tokens, _share)


def gather_sequences(x_TH: Tensor, state: ParallelState, batch_size: int) -> Tensor:
    """Returns complete sequences [B * S, ...] of the parts that context-parallel ranks hold; the backward takes this rank's part
    of a gradient that is equal on all ranks.
    """

    def gathered(x_TH: Tensor, group: Group) -> Tensor:
        parts = group.all_gather(x_TH[None]).unflatten(1, (batch_size, -1))
        return whole_sequences(parts, group.size).flatten(0, 1)

    return _border(x_TH, state.cp, gathered, lambda dx_TH, _group: own_tokens(dx_TH, state, batch_size))


def own_tokens(x_TH: Tensor, state: ParallelState, batch_size: int) -> Tensor:
    """Returns the rows of complete sequences [B * S, ...] that this rank's tensor-parallel group holds."""
    if state.cp.size == 1:
        return x_TH
    return state.token_share.of_sequences(x_TH.unflatten(0, (batch_size, -1))).flatten(0, 1)


def to_heads(x_BSAD: Tensor, cp: Group) -> Tensor:
    """Returns complete sequences of this context-parallel rank's heads, [B, S, A / n, D], for all heads of its part of them
    (Ulysses, arXiv:2309.14509).
    """
    return _border(x_BSAD, cp, _sequences_of_heads, _heads_of_sequences)


def to_sequences(y_BSAD: Tensor, cp: Group) -> Tensor:
    """Returns all heads of this rank's part of sequences for complete sequences of its heads: the way back from `to_heads`."""
    return _border(y_BSAD, cp, _heads_of_sequences, _sequences_of_heads)


def _sequences_of_heads(x_BSAD: Tensor, cp: Group) -> Tensor:
    heads = x_BSAD.unflatten(2, (cp.size, -1)).movedim(2, 0)
    return whole_sequences(cp.all_to_all(heads), cp.size)


def _heads_of_sequences(x_BSAD: Tensor, cp: Group) -> Tensor:
    parts = [TokenShare((rank, cp.size)).of_sequences(x_BSAD) for rank in range(cp.size)]
    return cp.all_to_all(torch.stack(parts)).movedim(0, 2).flatten(2, 3)


def _same(x: Tensor, _group: Group) -> Tensor:
    return x.view_as(x)


def _sum(x: Tensor, group: Group) -> Tensor:
    return group.all_reduce(x.clone(memory_format=torch.contiguous_format))


def _share(x: Tensor, group: Group) -> Tensor:
    assert x.shape[0] % group.size == 0, f"{x.shape[0]} tokens do not divide over {group.size} ranks"
    return x.chunk(group.size)[group.rank].contiguous()


def _all_tokens(x: Tensor, group: Group) -> Tensor:
    return group.all_gather(x)


def _summed_share(x: Tensor, group: Group) -> Tensor:
    return group.reduce_scatter(x)


def _border(x: Tensor, group: Group, forward: Communication, backward: Communication) -> Tensor:
    return x if group.size == 1 else _Border.apply(x, group, forward, backward)


class _Border(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, forward: Communication, backward: Communication) -> Tensor:  # type: ignore[override]
        ctx.group, ctx.conjugate = group, backward
        return forward(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return ctx.conjugate(grad, ctx.group), None, None, None
