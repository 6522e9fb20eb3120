"""A rank's tensors as parts of global tensors.

A checkpoint knows only global names, shapes and offsets. Saving writes each part once, from its first replica
(`file_storage`). Loading (`loading`) reads whatever overlaps this rank's parts, so the layout that saved does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_samoe.dist_checkpointing.table_of_contents import read_table
from megatron_samoe.parallel_state.shard_spec import FlatSlice, ShardSpec, is_counted_here
from megatron_samoe.parallel_state.state import ParallelState


@dataclass(frozen=True)
class ShardedTensor:
    """One rank's part of a global tensor.

    Attributes:
        local: the part's data, a view that loading writes into.
        is_owner: whether this rank saves it.
    """

    local: Tensor
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    is_owner: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of the part in each dim."""
        return tuple(self.local.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the part and of the global tensor."""
        return self.local.dtype


@dataclass(frozen=True)
class UnreadTensor:
    """A global tensor that is made just before it is written, and freed after.

    Attributes:
        at: leading indices, where it is a part of the global tensor.
    """

    read: Callable[[], Tensor]
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    is_owner: bool = True
    at: tuple[int, ...] = ()

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where the part begins in each dim."""
        return (*self.at, *(0 for _ in self.global_shape[len(self.at) :]))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of the part in each dim."""
        return (*(1 for _ in self.at), *self.global_shape[len(self.at) :])

    @property
    def local(self) -> Tensor:
        """The tensor; each call makes a new one."""
        tensor = self.read()
        assert tensor.shape == self.global_shape[len(self.at) :] and tensor.dtype == self.dtype
        return tensor.reshape(self.sizes)


#: The parts of each global tensor that this rank holds.
ShardedState = Mapping[str, Sequence[ShardedTensor]]
#: What is to be written: parts at hand, or tensors that are made one by one.
WritableState = Mapping[str, Sequence[ShardedTensor | UnreadTensor]]


def sharded(
    local: Tensor, spec: ShardSpec, state: ParallelState, part: FlatSlice | None = None, is_owner: bool | None = None
) -> list[ShardedTensor]:
    """Returns this rank's parts of a tensor that is sharded as `spec` says.

    Args:
        local: this rank's shard, or its slice `part`.
        is_owner: whether this rank saves it; if not given, the first of its replicas does.
    """
    shape = part.shape if part is not None else tuple(local.shape)
    full_shape, base = spec.global_shape(shape, state), spec.offsets(shape, state)
    owner = is_counted_here(spec, state, is_sliced=part is not None) if is_owner is None else is_owner
    if part is None:
        return [ShardedTensor(local.detach(), full_shape, base, owner)]
    parts, start, flat = [], 0, local.detach().view(-1)
    for offsets, sizes in part.boxes():
        count = math.prod(sizes)
        begin = tuple(b + o for b, o in zip(base, offsets, strict=True))
        parts.append(ShardedTensor(flat[start : start + count].view(sizes), full_shape, begin, owner))
        start += count
    return parts


def replicated(tensor: Tensor, state: ParallelState) -> list[ShardedTensor]:
    """Returns the single part of a tensor of which every rank holds all."""
    return [ShardedTensor(tensor, tuple(tensor.shape), (0,) * tensor.dim(), state.rank == 0)]


def stored_names(directory: str) -> set[str]:
    """Returns the names of all tensors and objects in a checkpoint folder."""
    table = read_table(directory)
    return {*table.tensors, *table.objects}
