"""The sharding of a parameter: the shard of the full tensor that each rank holds, and the slice of that shard."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from megatron_samoe.parallel_state.rank_grid import GROUPS
from megatron_samoe.parallel_state.state import Group, ParallelState


@dataclass(frozen=True)
class ShardSpec:
    """The sharding of one parameter.

    Attributes:
        family: dense and embedding parameters live on the dense grid, expert and pool parameters on the expert grid.
            The pool is shared by all pipeline stages; a tied embedding by the first and the last.
        partition: (tensor dim, axis) pairs: the dim is split into equal, consecutive parts over the axis. Over all
            other axes of its grid the parameter is replicated.
        partial: axes over which replicas have gradients that are parts of a sum, not equal.
    """

    family: Literal["dense", "embedding", "expert", "pool"] = "dense"
    partition: tuple[tuple[int, str], ...] = ()
    partial: tuple[str, ...] = ()

    @property
    def gradient_axes(self) -> tuple[str, ...]:
        """Axes over which gradients are summed: those with different data, and those with partial sums.

        Losses are divided by the token count of the global batch, so gradients of other sequences, or of other parts of
        them, are summed too, never averaged.
        """
        axes = {"dense": ("cp", "dp"), "embedding": ("cp", "dp", "pp"), "expert": ("edp",), "pool": ("edp", "pp")}
        return tuple(sorted({*axes[self.family], *self.partial}))

    def global_shape(self, local_shape: torch.Size | tuple[int, ...], state: ParallelState) -> tuple[int, ...]:
        """Returns the full tensor's shape."""
        shape = list(local_shape)
        for dim, axis in self.partition:
            shape[dim] *= state.group(axis).size
        return tuple(shape)

    def offsets(self, local_shape: torch.Size | tuple[int, ...], state: ParallelState) -> tuple[int, ...]:
        """Returns where this rank's shard begins in the full tensor."""
        start = [0] * len(local_shape)
        for dim, axis in self.partition:
            start[dim] = local_shape[dim] * state.group(axis).rank
        return tuple(start)

    def local_slice(self, full: Tensor, state: ParallelState) -> Tensor:
        """Returns this rank's shard of a full tensor, as a view."""
        for dim, axis in self.partition:
            group = state.group(axis)
            full = full.chunk(group.size, dim)[group.rank]
        return full

    def replica_axes(self, state: ParallelState) -> set[str]:
        """Returns the axes along which ranks hold the same shard."""
        own_grid = "dense" if self.family in ("dense", "embedding") else "expert"
        axes = set(state.grid.axes(own_grid)) - {axis for _, axis in self.partition}
        if self.family not in ("pool", "embedding"):
            axes.discard("pp")  # stages have different layers
        return axes


@dataclass(frozen=True)
class FlatSlice:
    """Consecutive elements of this rank's flattened shard of a parameter. Ranks that would hold replicas hold a slice
    each.

    Attributes:
        shape: of the rank's shard, before flattening.
        start, stop: range of the elements; empty where start = stop.
        num_leading_dims: number of leading dims that are not flattened: the same slice is taken of each of their indices.
    """

    shape: tuple[int, ...]
    start: int
    stop: int
    num_leading_dims: int = 0

    @staticmethod
    def of_rank(shape: tuple[int, ...], group: Group, num_leading_dims: int = 0) -> FlatSlice:
        """Returns this member's slice where a group holds a shard in even slices. The last slices may be short or
        empty.
        """
        total = math.prod(shape[num_leading_dims:])
        size = -(-total // group.size)
        start, stop = min(size * group.rank, total), min(size * (group.rank + 1), total)
        return FlatSlice(tuple(shape), start, stop, num_leading_dims)

    @property
    def leading_shape(self) -> tuple[int, ...]:
        """The leading dims that are not flattened."""
        return self.shape[: self.num_leading_dims]

    def boxes(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Returns (offsets, sizes) of the fewest boxes that make up the slice, in its order."""
        inner = _boxes(self.shape[self.num_leading_dims :], self.start, self.stop)
        ones = (1,) * self.num_leading_dims
        return [
            ((*index, *offsets), (*ones, *sizes))
            for index in itertools.product(*(range(n) for n in self.leading_shape))
            for offsets, sizes in inner
        ]


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [((start,), (stop - start,))] if shape else [((), ())]
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        inner = _boxes(shape[1:], start - first * row, stop - first * row)
        return [((first, *offsets), (1, *sizes)) for offsets, sizes in inner]
    boxes = []
    if start % row:
        boxes += _boxes(shape, start, (first + 1) * row)
        first += 1
    end = stop // row
    if end > first:
        boxes.append(((first, *(0,) * (len(shape) - 1)), (end - first, *shape[1:])))
    if stop % row:
        boxes += _boxes(shape, end * row, stop)
    return boxes


def is_counted_here(spec: ShardSpec, state: ParallelState, is_sliced: bool) -> bool:
    """Returns whether this rank counts the elements it holds in norms and writes them to checkpoints.

    Args:
        is_sliced: whether the ranks that sum the gradient hold different elements of it.
    """
    axes = spec.replica_axes(state) - (set(spec.gradient_axes) if is_sliced else set())
    return all(state.group(axis).rank == 0 for axis in axes)


@lru_cache(maxsize=1024)
def gradient_group_name(spec: ShardSpec) -> str:
    """Returns the name of the group over which a parameter's gradient is summed."""
    if spec.family == "embedding":
        assert spec.gradient_axes == ("cp", "dp", "pp")
        return "embed_dp"
    for name, (_, axes) in GROUPS.items():
        if tuple(sorted(axes)) == spec.gradient_axes:
            return name
    raise AssertionError(f"no process group spans {spec.gradient_axes}")
