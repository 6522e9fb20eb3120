"""A rank's tensors as parts of global tensors, and the reading of such parts from checkpoints of any layout.

A checkpoint knows only global names, shapes and offsets. Saving writes each part once, from its first replica
(`file_storage`). Loading reads whatever overlaps this rank's parts, so the layout that saved does not matter.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_samoe.dist_checkpointing.saved_tensor import read_saved_tensor, read_saved_tensor_into
from megatron_samoe.dist_checkpointing.table_of_contents import PartedTensor, StoredPart, TableOfContents, read_table
from megatron_samoe.errors import CheckpointError, some
from megatron_samoe.parallel_state.shard_spec import FlatSlice, ShardSpec, is_counted_here
from megatron_samoe.parallel_state.state import ParallelState

#: Threads that read: most of the time goes into copies of what verifying has left in memory.
READERS = 2


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


def read_sharded(state: ShardedState, directory: str, parallel: ParallelState) -> None:
    """Fills a state's local parts from a folder; all ranks call it together.

    Raises:
        CheckpointError: tensors are missing or have other shapes, or files are damaged; the same on all ranks.
    """
    problem = None
    try:
        _read(state, directory)
    except CheckpointError as error:
        problem = str(error)
    except Exception as error:  # torch raises several kinds for damaged files
        problem = f"The checkpoint in {directory} cannot be read: {str(error) or type(error).__name__}."
    problems = [found for found in parallel.world.all_gather_object(problem) if found is not None]
    if problems:
        raise CheckpointError(problems[0], collective=True)


def _read(state: ShardedState, directory: str) -> None:
    table = read_table(directory)
    check_tensors(state, table)
    wanted = [(n, table.tensors[n], part, parts) for n, parts in state.items() for part in table.tensors[n].parts]
    with ThreadPoolExecutor(READERS) as readers:
        for _ in readers.map(lambda job: _fill(Path(directory), *job), wanted):
            pass


def check_tensors(state: ShardedState, table: TableOfContents) -> None:
    """Raises CheckpointError naming tensors that the checkpoint lacks or has in another shape."""
    missing = [name for name in state if name not in table.tensors]
    if missing:
        raise CheckpointError(
            f"The checkpoint has no tensor {some(missing)}: it is of a model with other layers, experts or options "
            "(compare its config.yaml)."
        )
    shaped = [
        f"{name} is {list(table.tensors[name].shape)} in the checkpoint and {list(t.global_shape)} in the model"
        for name, parts in state.items()
        for t in parts[:1]
        if table.tensors[name].shape != t.global_shape
    ]
    if shaped:
        raise CheckpointError(f"The checkpoint does not fit the model: {some(shaped)}.")


def _fill(directory: Path, name: str, parted: PartedTensor, stored: StoredPart, parts: Sequence[ShardedTensor]) -> None:
    """Copies a stored part of a tensor to where this rank's parts overlap it. It is read at most once, and straight to its
    place where that has its size: a copy between would need its memory twice."""
    saved: Tensor | None = None
    for part in parts:
        starts = tuple(map(max, part.offsets, stored.offsets))
        ends = tuple(map(min, _ends(part), _ends(stored)))
        if any(start >= end for start, end in zip(starts, ends, strict=True)):
            continue
        target = part.local.detach()[_box(starts, ends, part.offsets)]
        if saved is None and target.shape == stored.sizes:
            with open(directory / stored.file, "rb", buffering=0) as file:
                if read_saved_tensor_into(target, file, stored.start, stored.length):
                    continue
        if saved is None:
            saved = read_part(directory, name, parted, stored, verifies=False)
        target.copy_(saved[_box(starts, ends, stored.offsets)])


def _ends(part: ShardedTensor | StoredPart) -> tuple[int, ...]:
    return tuple(map(operator.add, part.offsets, part.sizes))


def _box(starts: Sequence[int], ends: Sequence[int], base: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start - b, end - b) for start, end, b in zip(starts, ends, base, strict=True))


def read_part(directory: Path, name: str, parted: PartedTensor, part: StoredPart, verifies: bool = True) -> Tensor:
    """Returns a stored part of a tensor; see `read_saved_tensor`.

    Raises:
        CheckpointError: its file is damaged.
    """
    path = directory / part.file
    try:
        tensor = read_saved_tensor(path, part.start, part.length, verifies)
    except Exception as error:  # torch raises several kinds for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged: {name} cannot be read ({reason}).") from None
    if tensor.shape != part.sizes or tensor.dtype != parted.dtype:
        raise CheckpointError(
            f"{path} is damaged: {name} is {list(tensor.shape)} {tensor.dtype} in place of {list(part.sizes)} {parted.dtype}."
        )
    return tensor
