"""Full tensors for updates that need them, each on one rank, from the elements that ranks update.

A shard of a parameter (by tensor, expert parallelism) is [*stacked, *tensor]: the leading dims count experts and banks. Ranks
that sum a gradient hold equal shards, or with ZeRO-1 and a sharded pool a slice each. Tensors of parameters of one shape
are taken together, and shared among these ranks: an all-to-all brings the slices of a tensor to its owner, and brings its
direction back. Where all hold the shard, nothing is brought, and owners send directions to all. Of tensor-parallel ranks, a
second all-to-all makes one the owner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_samoe.distributed.grad_buffer import Piece
from megatron_samoe.parallel_state.parameter_tag import ParameterTag
from megatron_samoe.parallel_state.shard_spec import FlatSlice
from megatron_samoe.parallel_state.state import Group, ParallelState

#: Parameters are taken together up to this number of elements for a rank, those that it gets in full and those that it sends.
BATCH_ELEMENTS = 1 << 24
#: On a CPU, where one rank has full tensors, up to this number: what an update reads and writes then stays in the cache.
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
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each tensor, or of this rank's part of it."""
        return self.shape[self.num_stacked :]

    @property
    def split(self) -> tuple[int, str] | None:
        """The dim of a tensor, and the axis, over which tensors are split; None where the rank has all of each."""
        found = [(dim - self.num_stacked, axis) for dim, axis in self.tag.shard.partition if dim >= self.num_stacked]
        assert len(found) <= 1, "a tensor is split along one dim"
        return found[0] if found else None

    @property
    def kind(self) -> tuple:
        """The common facts of shards that are taken together."""
        return self.tag.gradient_group, self.shape, self.num_stacked, self.split or ()


def even_sizes(count: int, members: int, first: int) -> list[int]:
    """Returns how many of `count` consecutive things each member gets; who is `first` gets one more before others do."""
    return [count // members + ((member - first) % members < count % members) for member in range(members)]


@dataclass(frozen=True)
class _Batch:
    """Equal shards whose tensors are shared among the ranks that sum their gradients.

    Attributes:
        held: of each shard, the slice of each member.
        sizes: tensors that each member owns, in order; of a rank's own ones, `split_sizes` those of each rank of the split.
        send, receive: elements that this rank has of each member's tensors, and each member of this rank's; () where all
            members hold all.
    """

    names: Sequence[str]
    like: Shard
    held: Sequence[Sequence[FlatSlice]]
    group: Group
    split: Group | None
    sizes: Sequence[int]
    split_sizes: Sequence[int]
    send: Sequence[int]
    receive: Sequence[int]


class WholeTensors:
    """The way of tensors to their owners and back, for the parameters of one update; ranks make and use it together.

    Args:
        shards: this rank's shards, in the same order on all ranks of their groups.
        pieces: this rank's elements of some of them.
        turns: who is next, in each group, to own one tensor more than others; by the group's name, and changed here. One
            for all updates of a rank.
    """

    def __init__(
        self, shards: Mapping[str, Shard], pieces: Mapping[str, Piece], state: ParallelState, turns: dict[str, int]
    ):
        self._pieces = {name: pieces[name] for name in shards if name in pieces}
        held = _slices_of_members(shards, self._pieces, state)
        self._batches = [
            _batch(names, shards[names[0]], [held[name] for name in names], state, turns)
            for names in _equal_shards(shards, held, state)
        ]

    def directions(
        self, direction: Callable[[Tensor], Tensor], step_of: Callable[[str], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields the direction of each piece by name, one batch of tensors after the other.

        Args:
            direction: takes and returns a stack [n, *tensor] of full tensors.
            step_of: gives what `direction` is computed from, for a piece; called once for each.
        """
        for batch in self._batches:
            steps = [step_of(name) for name in batch.names if name in self._pieces]
            own = _to_owner(batch, steps)
            if batch.split is None or batch.split.size == 1:
                found = direction(own) if len(own) else own
            else:
                found = _by_owner(own, batch, direction) if len(own) else own
            for name, part in zip(batch.names, _from_owner(batch, found), strict=True):
                if name in self._pieces:
                    yield name, part


def _slices_of_members(
    shards: Mapping[str, Shard], pieces: Mapping[str, Piece], state: ParallelState
) -> dict[str, list[FlatSlice]]:
    """Returns the slice of each shard that each rank of its gradient's group holds."""
    own = {}
    for name, shard in shards.items():
        piece, total = pieces.get(name), math.prod(shard.shape)
        every = FlatSlice(shard.shape, 0, total if piece is not None else 0)
        own[name] = piece.slice if piece is not None and piece.slice is not None else every
    held: dict[str, list[FlatSlice]] = {}
    for axis in sorted({shard.tag.gradient_group for shard in shards.values()}):
        names = [name for name, shard in shards.items() if shard.tag.gradient_group == axis]
        members = state.group(axis).all_gather_object([own[name] for name in names])
        held.update({name: list(slices) for name, slices in zip(names, zip(*members, strict=True), strict=True)})
    return held


def _is_complete(held: FlatSlice) -> bool:
    return held.num_leading_dims == 0 and held.stop - held.start == math.prod(held.shape)


def _equal_shards(
    shards: Mapping[str, Shard], held: Mapping[str, Sequence[FlatSlice]], state: ParallelState
) -> Iterator[list[str]]:
    """Yields the names of shards that are taken together, in an order that all ranks keep."""
    kinds: dict[tuple, list[str]] = {}
    for name, shard in shards.items():
        is_replicated = all(_is_complete(part) for part in held[name])
        kinds.setdefault((*shard.kind, is_replicated), []).append(name)
    for kind in sorted(kinds):
        shard, is_replicated = shards[kinds[kind][0]], kind[-1]
        group, split = _groups(shard, state)
        if group.size == 1 and (split is None or split.size == 1) and shard.like.device.type == "cpu":
            limit = CACHED_ELEMENTS
        else:  # of slices a rank sees its own and those of the tensors that it owns
            limit = BATCH_ELEMENTS * (1 if is_replicated else group.size)
        most = max(limit // max(math.prod(shard.shape), 1), 1)
        for start in range(0, len(kinds[kind]), most):
            yield kinds[kind][start : start + most]


def _groups(shard: Shard, state: ParallelState) -> tuple[Group, Group | None]:
    """Returns the groups over which tensors of a shard are spread: that of its gradient, and that of its split."""
    return state.group(shard.tag.gradient_group), None if shard.split is None else state.group(shard.split[1])


def _batch(
    names: Sequence[str], like: Shard, held: Sequence[Sequence[FlatSlice]], state: ParallelState, turns: dict[str, int]
) -> _Batch:
    group, split = _groups(like, state)
    count = len(names) * like.num_tensors
    sizes = _share(count, group, like.tag.gradient_group, turns)
    split_sizes = [] if split is None else _share(sizes[group.rank], split, f"split {like.split}", turns)
    send, receive = [], []
    if not all(_is_complete(part) for slices in held for part in slices):
        bounds = [sum(sizes[:member]) for member in range(group.size + 1)]
        for member in range(group.size):
            send.append(_num_held(like, held, group.rank, bounds[member], bounds[member + 1]))
            receive.append(_num_held(like, held, member, bounds[group.rank], bounds[group.rank + 1]))
    return _Batch(names, like, held, group, split, sizes, split_sizes, send, receive)


def _share(count: int, group: Group, name: str, turns: dict[str, int]) -> list[int]:
    """Returns how many tensors each member of a group owns, and notes who is next to own one more."""
    first = turns.get(name, 0)
    turns[name] = (first + count) % group.size
    return even_sizes(count, group.size, first)


def _held_views(
    like: Shard, held: Sequence[Sequence[FlatSlice]], member: int, first: int, tensors: Tensor
) -> Iterator[Tensor]:
    """Yields, in order, the parts of a batch's consecutive tensors [n, ...] from number `first` on that a member holds."""
    numel, per_shard = math.prod(like.tensor_shape), math.prod(like.shape)
    flat, low = tensors.view(-1), first * numel
    high = low + flat.numel()
    for number in range(low // per_shard, -(-high // per_shard)):
        start, stop = max(low, number * per_shard), min(high, (number + 1) * per_shard)
        yield from _slice_views(held[number][member], start - number * per_shard, flat[start - low : stop - low])


def _slice_views(held: FlatSlice, low: int, flat: Tensor) -> Iterator[Tensor]:
    """Yields the parts of a shard's elements `flat`, the first of which is its number `low`, that a slice holds: the same
    columns of each row."""
    if held.start >= held.stop:
        return
    row, high = math.prod(held.shape[held.num_leading_dims :]), low + flat.numel()
    first_row = min(-(-low // row) * row, high)
    end_of_rows = max(high // row * row, first_row)
    yield from _part_of_row(held, low % row, flat[: first_row - low])
    if first_row < end_of_rows:
        yield flat[first_row - low : end_of_rows - low].view(-1, row)[:, held.start : held.stop]
    yield from _part_of_row(held, 0, flat[end_of_rows - low :])


def _part_of_row(held: FlatSlice, column: int, elements: Tensor) -> Iterator[Tensor]:
    """Yields those of a row's elements from a column on that a slice holds, if any."""
    start, stop = max(held.start - column, 0), min(held.stop - column, elements.numel())
    if start < stop:
        yield elements[start:stop]


def _num_held(like: Shard, held: Sequence[Sequence[FlatSlice]], member: int, first: int, stop: int) -> int:
    shape = torch.empty((stop - first, *like.tensor_shape), device="meta")
    return sum(view.numel() for view in _held_views(like, held, member, first, shape))


def _to_owner(batch: _Batch, steps: Sequence[Tensor]) -> Tensor:
    """Returns the tensors [n, *tensor] that this rank owns, of which each rank has the elements that it updates."""
    like, rank = batch.like, batch.group.rank
    first, count = sum(batch.sizes[:rank]), batch.sizes[rank]
    if not batch.send:
        parts = []
        for number, step in enumerate(steps):
            start = first - number * like.num_tensors
            tensors = step.view(like.num_tensors, *like.tensor_shape)
            parts.append(tensors[max(start, 0) : max(start + count, 0)])
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    empty = like.like.new_empty(0)
    sent = torch.cat([empty, *(step.reshape(-1).to(empty.dtype) for step in steps)])
    received = batch.group.all_to_all_uneven(sent, batch.send, batch.receive).split(list(batch.receive))
    own = like.like.new_zeros((count, *like.tensor_shape))
    for member, elements in enumerate(received):
        start = 0
        for view in _held_views(like, batch.held, member, first, own):
            view.copy_(elements[start : start + view.numel()].view(view.shape))
            start += view.numel()
    return own


def _from_owner(batch: _Batch, found: Tensor) -> Iterator[Tensor]:
    """Yields, of each shard of a batch, the directions of the elements that this rank updates."""
    like, rank = batch.like, batch.group.rank
    if not batch.send:
        yield from batch.group.all_gather_uneven(found.contiguous(), batch.sizes).view(len(batch.names), *like.shape)
        return
    first, found = sum(batch.sizes[:rank]), found.contiguous()
    parts = [
        view.reshape(-1)
        for member in range(batch.group.size)
        for view in _held_views(like, batch.held, member, first, found)
    ]
    sent = torch.cat([found.new_empty(0), *parts])
    received = batch.group.all_to_all_uneven(sent, batch.receive, batch.send)
    tensors = [math.prod(slices[rank].leading_shape) for slices in batch.held]
    yield from received.split([n * (s[rank].stop - s[rank].start) for n, s in zip(tensors, batch.held, strict=True)])


def _by_owner(stack: Tensor, batch: _Batch, direction: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns the directions of tensors that are split along a dim over a group, each rank computing some of them."""
    group, sizes = batch.split, batch.split_sizes
    assert group is not None and batch.like.split is not None
    dim, own = batch.like.split[0] + 1, sizes[group.rank]
    parts = group.all_to_all_uneven(stack, sizes, [own] * group.size)  # every member's part of this rank's tensors
    if own:
        full = direction(torch.cat(parts.chunk(group.size), dim))
        parts = torch.cat(full.chunk(group.size, dim))
    return group.all_to_all_uneven(parts, [own] * group.size, sizes)
