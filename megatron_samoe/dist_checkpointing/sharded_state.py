"""A rank's tensors as parts of global tensors, for torch.distributed.checkpoint.

A checkpoint knows only global names, shapes and offsets. Saving writes each part once, from its first replica. Loading
reads whatever overlaps this rank's part, so the layout that saved does not matter.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_samoe.dist_checkpointing.file_storage import Reader
from megatron_samoe.dist_checkpointing.streaming_writer import StreamingWriter
from megatron_samoe.dist_checkpointing.table_of_contents import read_metadata
from megatron_samoe.errors import CheckpointError, some
from megatron_samoe.parallel_state.shard_spec import FlatSlice, ShardSpec, is_counted_here
from megatron_samoe.parallel_state.state import ParallelState

# torch warns at every save and load of a single process, where one process is meant.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


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
    def chunk(self) -> ChunkStorageMetadata:
        """The part's place in the global tensor."""
        return ChunkStorageMetadata(torch.Size(self.offsets), self.local.shape)

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
    def chunk(self) -> ChunkStorageMetadata:
        """The place of the part in the global tensor."""
        sizes = (*(1 for _ in self.at), *self.global_shape[len(self.at) :])
        return ChunkStorageMetadata(torch.Size(self.offsets), torch.Size(sizes))

    @property
    def local(self) -> Tensor:
        """The tensor; each call makes a new one."""
        tensor = self.read()
        assert tensor.shape == self.global_shape[len(self.at) :] and tensor.dtype == self.dtype
        return tensor.reshape(self.chunk.sizes)


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
    whole, base = spec.global_shape(shape, state), spec.offsets(shape, state)
    owner = is_counted_here(spec, state, is_sliced=part is not None) if is_owner is None else is_owner
    if part is None:
        return [ShardedTensor(local.detach(), whole, base, owner)]
    parts, start, flat = [], 0, local.detach().view(-1)
    for offsets, sizes in part.boxes():
        count = math.prod(sizes)
        place = tuple(b + o for b, o in zip(base, offsets, strict=True))
        parts.append(ShardedTensor(flat[start : start + count].view(sizes), whole, place, owner))
        start += count
    return parts


class SavePlanner(DefaultSavePlanner):
    """Planner of writes: the parts that this rank owns."""

    def __init__(self, state: WritableState, objects: Mapping[str, bytes]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.sharded, self.objects = state, objects

    def create_local_plan(self) -> SavePlan:
        """Returns one write item per owned part and per object."""
        items = [
            WriteItem(
                index=MetadataIndex(name, torch.Size(t.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=t.chunk,
                    properties=TensorProperties(dtype=t.dtype),
                    size=torch.Size(t.global_shape),
                ),
            )
            for name, parts in self.sharded.items()
            for t in parts
            if t.is_owner
        ]
        items += [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self.objects]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Returns what is to be written."""
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self.objects[write_item.index.fqn])
        return next(
            t for t in self.sharded[write_item.index.fqn] if torch.Size(t.offsets) == write_item.index.offset
        ).local


class LoadPlanner(DefaultLoadPlanner):
    """Planner of reads: the stored parts that overlap this rank's parts."""

    def __init__(self, state: ShardedState):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.sharded = state

    def create_local_plan(self) -> LoadPlan:
        """Returns the reads that fill all parts.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        assert self.metadata is not None
        check_tensors(self.sharded, self.metadata.state_dict_metadata)
        items: list[ReadItem] = []
        for name, parts in self.sharded.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, stored, [t.chunk for t in parts])
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Returns the view of this rank's part that a read fills."""
        index = read_item.dest_index
        tensor = next(t for t in self.sharded[index.fqn] if torch.Size(t.offsets) == index.offset).local
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Does nothing: `resolve_tensor` gave a view of the part."""


def check_tensors(state: ShardedState, stored: Mapping[str, object]) -> None:
    """Raises CheckpointError naming tensors that the checkpoint lacks or has in another shape."""
    missing = [name for name in state if name not in stored]
    if missing:
        raise CheckpointError(
            f"The checkpoint has no tensor {some(missing)}: it is of a model with other layers, experts or options "
            "(compare its config.yaml)."
        )
    shaped = [
        f"{name} is {list(meta.size)} in the checkpoint and {list(t.global_shape)} in the model"
        for name, parts in state.items()
        for t in parts[:1]
        if isinstance(meta := stored[name], TensorStorageMetadata) and tuple(meta.size) != t.global_shape
    ]
    if shaped:
        raise CheckpointError(f"The checkpoint does not fit the model: {some(shaped)}.")


def write_sharded(
    state: WritableState, directory: str, parallel: ParallelState, objects: Mapping[str, bytes] | None = None
) -> dict[str, str]:
    """Writes a state into an existing folder and returns the digests of this rank's files; all ranks call it together.

    Args:
        objects: serialized values that this rank writes besides, by name.
    """
    writer = StreamingWriter(directory)
    dcp.save(
        {},
        storage_writer=writer,
        planner=SavePlanner(state, objects or {}),
        process_group=parallel.world.handle,
        no_dist=parallel.world_size == 1,
    )
    return writer.digests


def read_sharded(state: ShardedState, directory: str, parallel: ParallelState) -> None:
    """Fills a state's local parts from a folder; all ranks call it together.

    Raises:
        CheckpointError: tensors are missing or have other shapes, or files are damaged.
    """
    try:
        read_metadata(directory)  # torch would log a traceback of its own
        dcp.load(
            {},
            storage_reader=Reader(directory),
            planner=LoadPlanner(state),
            process_group=parallel.world.handle,
            no_dist=parallel.world_size == 1,
        )
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:
        causes = causes_of(error)
        known = next((cause for cause in causes if isinstance(cause, CheckpointError)), None)
        reasons = "; ".join(sorted({str(cause) or type(cause).__name__ for cause in causes}))
        raise known or CheckpointError(f"The checkpoint in {directory} cannot be read: {reasons}.") from error


def causes_of(error: BaseException) -> list[BaseException]:
    """Returns the errors of all ranks: torch wraps them in an exception that `except Exception` does not catch."""
    if isinstance(error, CheckpointException):
        return [failure[0] for failure in error.failures.values()]
    return [error]


def stored_names(directory: str) -> set[str]:
    """Returns the names of all tensors in a checkpoint folder."""
    return set(read_metadata(directory).state_dict_metadata)


def replicated(tensor: Tensor, state: ParallelState) -> list[ShardedTensor]:
    """Returns the single part of a tensor that every rank holds whole."""
    return [ShardedTensor(tensor, tuple(tensor.shape), (0,) * tensor.dim(), state.rank == 0)]
