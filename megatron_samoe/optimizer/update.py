"""Update algorithms other than AdamW, one for each group of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_samoe.distributed.grad_buffer import Piece
from megatron_samoe.parallel_state.parameter_tag import ParameterTag
from megatron_samoe.parallel_state.shard_spec import ShardSpec
from megatron_samoe.parallel_state.state import ParallelState


class Update(Protocol):
    """An update algorithm: master -= lr * (direction(accumulate(gradient)) + weight_decay * master).

    Attributes:
        moments: names of the state of each element; checkpoints carry it.
        needs_whole: whether `direction` needs whole tensors, gathered over ZeRO-1 and tensor-parallel shards.
    """

    moments: Sequence[str]
    needs_whole: bool

    def accumulate(self, grad: Tensor, moments: Mapping[str, Tensor], step: int) -> Tensor:
        """Adds the gradient of the elements that this rank updates to the moments, and returns their step before
        `direction`. All have the shape of the elements.

        Args:
            grad: fp32, clipped; read-only.
            moments: by name; updated in place.
            step: number of the step, 1 for the first.
        """

    def direction(self, step: Tensor, num_stacked: int) -> Tensor:
        """Returns the direction of the update; lr * direction is subtracted from the master weights.

        Args:
            step: result of `accumulate`: the whole tensor with `needs_whole`, else this rank's elements. The result has
                its shape.
            num_stacked: number of leading dims of a whole tensor that only count its matrices (banks, this rank's
                experts).
        """


def gather_whole(own: Tensor | None, piece: Piece | None, tag: ParameterTag, shape: tuple[int, ...],
                 state: ParallelState, like: Tensor) -> Tensor:  # fmt: skip
    """Returns a whole tensor, gathered from the elements that ranks hold; they call it together.

    Args:
        own, piece: this rank's elements and their place; None where it holds none of this tensor.
        shape: shape of this rank's shard.
        like: a tensor with the dtype and device of the result.
    """
    shard = like.new_zeros(shape)
    if piece is not None and own is not None:
        if piece.slice is None:
            shard = own
        else:
            leading = len(piece.slice.whole_shape)
            columns = shard.flatten(leading) if leading else shard.view(-1)
            columns[..., piece.slice.start : piece.slice.stop] = own
    if piece is None or piece.slice is not None:
        shard = state.group(tag.gradient_group).all_reduce(shard.contiguous())
    for dim, axis in _split_dims(tag).partition:
        parts = state.group(axis).all_gather(shard.movedim(dim, 0).contiguous())
        shard = parts.movedim(0, dim)
    return shard


def own_elements(whole: Tensor, piece: Piece, state: ParallelState) -> Tensor:
    """Returns the elements of a whole tensor that this rank updates."""
    shard = _split_dims(piece.tag).local_slice(whole, state)
    if piece.slice is None:
        return shard
    return shard.flatten(len(piece.slice.whole_shape))[..., piece.slice.start : piece.slice.stop]


def _split_dims(tag: ParameterTag) -> ShardSpec:
    """Returns the sharding of the matrices alone: a rank's experts and banks stay its own."""
    matrices = tuple((dim, axis) for dim, axis in tag.shard.partition if dim >= tag.init.num_indexed_dims)
    return ShardSpec(tag.shard.family, partition=matrices)


@torch.no_grad()
def apply_update(
    update: Update, named: Mapping[str, tuple[ParameterTag, tuple[int, ...]]], pieces: Mapping[str, Piece],
    masters: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]], rates: tuple[float, float, float],
    step: int, state: ParallelState, like: Tensor,
) -> None:  # fmt: skip
    """Updates the master weights of a group's parameters. Ranks call it together, also those that hold no element of
    some tensor.

    Args:
        named: tag and shape of this rank's shard of every parameter of the group, in the same order on all ranks.
        rates: learning rate, weight decay, factor on the gradients.
    """
    lr, weight_decay, grad_scale = rates
    for name, (tag, shape) in named.items():
        piece, step_by = pieces.get(name), None
        if piece is not None:
            step_by = update.accumulate(piece.grad.to(masters[name].dtype) * grad_scale, moments[name], step)
        if update.needs_whole:
            whole = gather_whole(step_by, piece, tag, shape, state, like)
            whole = update.direction(whole, tag.init.num_indexed_dims)
            step_by = None if piece is None else own_elements(whole, piece, state)
        elif step_by is not None:
            step_by = update.direction(step_by, 0)
        if piece is not None and step_by is not None:
            master = masters[name]
            master.mul_(1.0 - lr * weight_decay).sub_(step_by.reshape(master.shape), alpha=lr)
