"""Whole tensors for updates that need them, each on one rank, from the elements that ranks update.

A shard of a parameter (by tensor, expert parallelism) is [*stacked, *tensor]: the leading dims count experts and banks. Ranks
that sum a gradient hold the shard alike, or with ZeRO-1 and a sharded pool a slice each. Stacks of parameters of one shape
are taken together. A reduce-scatter, to which each rank gives its slices and zeros, leaves each rank whole shards of some
tensors; an all-to-all over tensor-parallel ranks makes these whole tensors. Results go back the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_samoe.distributed.grad_buffer import Piece
from megatron_samoe.parallel_state.parameter_tag import ParameterTag
from megatron_samoe.parallel_state.state import Group, ParallelState

#: Parameters are taken together up to so many elements of a rank's shards, or as many as ranks need to have one each.
BATCH_ELEMENTS = 1 << 24
#: On a CPU, where one rank has whole tensors, up to so many: what an update reads and writes then stays in the cache.
CACHED_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Shard:
    """This rank's shard of a parameter.

    Attributes:
        like: a tensor with the dtype and device of updates.
    """

    tag: ParameterTag
    shape: tuple[int, ...]
    like: Tensor

    @property
    def num_stacked(self) -> int:
        """Number of leading dims that only count tensors."""
        return self.tag.init.num_indexed_dims

    @property
    def num_tensors(self) -> int:
        """Number of tensors that the shard stacks."""
        return math.prod(self.shape[: self.num_stacked])

    @property
    def split(self) -> tuple[int, str] | None:
        """The dim of a tensor, and the axis, over which tensors are split; None where the rank has them whole."""
        found = [(dim - self.num_stacked, axis) for dim, axis in self.tag.shard.partition if dim >= self.num_stacked]
        assert len(found) <= 1, "a tensor is split along one dim"
        return found[0] if found else None

    @property
    def kind(self) -> tuple:
        """What shards that are taken together have in common."""
        return self.tag.gradient_group, self.shape, self.num_stacked, self.split or ()


def whole_directions(
    direction: Callable[[Tensor], Tensor], shards: Mapping[str, Shard], pieces: Mapping[str, Piece],
    step_of: Callable[[str], Tensor], state: ParallelState,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """Yields the direction of each piece by name, computed from whole tensors by one rank each, a batch of alike ones after
    the other; ranks go through all of them together.

    Args:
        direction: takes and returns a stack [n, *tensor] of whole tensors, some of them zero.
        pieces: this rank's elements of some of the shards.
        step_of: gives what `direction` is computed from, for a piece; called once for each.
    """
    for names in _batches(shards, state):
        own = [pieces.get(name) for name in names]
        steps = [step_of(name) if name in pieces else None for name in names]
        whole = _directions([shards[name] for name in names], own, steps, direction, state)
        for name, piece, shard in zip(names, own, whole, strict=True):
            if piece is not None:
                yield name, _own(shard, piece)


def _batches(shards: Mapping[str, Shard], state: ParallelState) -> Iterator[list[str]]:
    """Yields the names of shards that are taken together, in an order that all ranks keep."""
    kinds: dict[tuple, list[str]] = {}
    for name, shard in shards.items():
        kinds.setdefault(shard.kind, []).append(name)
    for kind in sorted(kinds):
        shard = shards[kinds[kind][0]]
        owners = math.prod(group.size for group in _groups(shard, state))
        limit = CACHED_ELEMENTS if owners == 1 and shard.like.device.type == "cpu" else BATCH_ELEMENTS
        most = max(limit // max(math.prod(shard.shape), 1), -(-owners // max(shard.num_tensors, 1)), 1)
        for start in range(0, len(kinds[kind]), most):
            yield kinds[kind][start : start + most]


def _groups(shard: Shard, state: ParallelState) -> list[Group]:
    """Returns the groups over which tensors of a shard are spread: that of its gradient, and that of its split."""
    split = () if shard.split is None else (state.group(shard.split[1]),)
    return [state.group(shard.tag.gradient_group), *split]


def _directions(
    shards: Sequence[Shard], pieces: Sequence[Piece | None], steps: Sequence[Tensor | None],
    direction: Callable[[Tensor], Tensor], state: ParallelState,
) -> Tensor:  # fmt: skip
    """Returns the directions [number, *shard] of alike shards, on every rank of their gradient's group."""
    first, groups = shards[0], _groups(shards[0], state)
    count, owners = len(shards) * first.num_tensors, math.prod(group.size for group in groups)
    if owners == 1 and len(steps) == 1 and steps[0] is not None:
        stack = steps[0].view(count, *first.shape[first.num_stacked :])
    else:
        stack = _stacked(shards, pieces, steps, -(-count // owners) * owners)
    by_gradient = groups[0]
    if any(piece is None or piece.slice is not None for piece in pieces):
        stack = by_gradient.reduce_scatter(stack)
    else:
        stack = stack.chunk(by_gradient.size)[by_gradient.rank]
    if first.split is None or groups[1].size == 1:
        stack = direction(stack)
    else:
        stack = _by_owner(stack, first.split[0] + 1, groups[1], direction)
    return by_gradient.all_gather(stack)[:count].view(len(shards), *first.shape)


def _stacked(
    shards: Sequence[Shard], pieces: Sequence[Piece | None], steps: Sequence[Tensor | None], count: int
) -> Tensor:
    """Returns so many tensors [count, *tensor of a shard]: the steps at their places, and zeros."""
    first = shards[0]
    stack = first.like.new_zeros((count, *first.shape[first.num_stacked :]))
    for number, (piece, step) in enumerate(zip(pieces, steps, strict=True)):
        if piece is not None and step is not None:
            place = stack[number * first.num_tensors : (number + 1) * first.num_tensors]
            _own(place.view(first.shape), piece).copy_(step)
    return stack


def _by_owner(stack: Tensor, dim: int, group: Group, direction: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns the directions of tensors that are split along a dim over a group, each rank computing some of them."""
    parts = group.all_to_all(stack)  # [size * n, ...]: every member's part of this rank's n tensors
    whole = direction(torch.cat(parts.chunk(group.size), dim))
    return group.all_to_all(torch.cat(whole.chunk(group.size, dim)))


def _own(shard: Tensor, piece: Piece) -> Tensor:
    """Returns the elements of a shard that this rank updates, as a view."""
    if piece.slice is None:
        return shard
    return shard.view(*piece.slice.whole_shape, -1)[..., piece.slice.start : piece.slice.stop]
