"""The writing of parts of global tensors as torch.distributed.checkpoint does, with digests and in the memory of one tensor.

Its package takes most of a second to import, since DTensor and sympy come with it. So this file is imported where something
is saved, and not before.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import mmap
import os
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystem, _write_item
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from megatron_samoe.dist_checkpointing.digests import new_digest
from megatron_samoe.dist_checkpointing.sharded_state import WritableState
from megatron_samoe.errors import CheckpointError
from megatron_samoe.parallel_state.state import ParallelState

#: Of a file that is being written: few and large, since each waits for a thread to have a core.
WRITTEN_BYTES = 4 << 20
NUM_BLOCKS = 3

# torch warns at every save of a single process, where one process is meant.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def write_parts(
    state: WritableState, directory: str, parallel: ParallelState, objects: Mapping[str, bytes]
) -> dict[str, str]:
    """Writes a state into an existing folder and returns the digests of this rank's files; see `saving.write_sharded`."""
    writer = _Writer(directory)
    try:
        dcp.save(
            {},  # the planner brings the tensors
            storage_writer=writer,
            planner=_Planner(state, objects),
            process_group=parallel.world.handle,
            no_dist=parallel.world_size == 1,
        )
    except CheckpointException as found:  # of all ranks, in an exception that `except Exception` does not catch
        causes = {str(failure[0]).splitlines()[0] for failure in found.failures.values() if str(failure[0])}
        raise CheckpointError("; ".join(sorted(causes))) from found
    return writer.digests


class _Planner(DefaultSavePlanner):
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
                    chunk=ChunkStorageMetadata(torch.Size(t.offsets), torch.Size(t.sizes)),
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


class _DigestedFile(io.RawIOBase):
    """A new file, open for appending, that digests its bytes as they are written.

    Bytes are gathered into blocks. While one is filled and digested, a thread writes those before it, past the page cache where
    the file system can: filling pages takes several times the disk's time on a busy machine, and the last flush would stall.
    """

    def __init__(self, fd: int, writer: ThreadPoolExecutor):
        self.hash, self.position = new_digest(), 0
        self._fd, self._writer = fd, writer
        # Mapped memory begins at a page, as direct writes need it.
        self._blocks = [mmap.mmap(-1, WRITTEN_BYTES) for _ in range(NUM_BLOCKS)]
        self._pending: list[Future[None] | None] = [None] * NUM_BLOCKS
        self._number = self._filled = 0

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        num_bytes = left.nbytes
        while left.nbytes:
            size = min(left.nbytes, WRITTEN_BYTES - self._filled)
            self._blocks[self._number][self._filled : self._filled + size] = left[:size]
            self._filled += size
            left = left[size:]
            if self._filled == WRITTEN_BYTES:
                self._hand_over()
        self.position += num_bytes
        return num_bytes

    def _hand_over(self) -> None:
        """Gives the filled part of a block to the writer, digests it, and waits until the next block is free."""
        part = memoryview(self._blocks[self._number])[: self._filled]
        self._pending[self._number] = self._writer.submit(_write_all, self._fd, part)
        self.hash.update(part)
        self._number, self._filled = (self._number + 1) % len(self._blocks), 0
        self._wait_for(self._number)

    def _wait_for(self, number: int) -> None:
        waited, self._pending[number] = self._pending[number], None
        if waited is not None:
            waited.result()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        """Does nothing: torch asks after each tensor, and a part of a block would end the writing past the page cache."""

    def _hand_over_all(self) -> None:
        """Returns when the system has all bytes; raises errors of the disk."""
        if self._filled:
            self._hand_over()
        for number in range(len(self._blocks)):
            self._wait_for(number)

    def fileno(self) -> int:
        """Returns the file, which has all bytes, so that it can be flushed to the disk."""
        self._hand_over_all()
        return self._fd

    def finish(self) -> str:
        """Flushes to the disk and returns the digest. torch has closed the stream, or not, but not the file."""
        os.fsync(self.fileno())
        return self.hash.hexdigest()


def _open_direct(path: str | os.PathLike) -> int:
    """Opens a new file for writing past the page cache; through it where the file system has no other way."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _write_all(fd: int, data: memoryview) -> None:
    """Writes bytes that begin at a page of memory and, except the last ones of a file, end at one."""
    while data.nbytes:
        if data.nbytes % mmap.PAGESIZE:
            _write_through_cache(fd)
        try:
            data = data[os.write(fd, data) :]
        except OSError as error:
            # Some file systems open such files and refuse their writes.
            if error.errno != errno.EINVAL or not _write_through_cache(fd):
                raise


def _write_through_cache(fd: int) -> bool:
    """Ends direct writing; returns whether that changed anything."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    direct = getattr(os, "O_DIRECT", 0)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~direct)
    return bool(flags & direct)


class _DigestingFileSystem(FileSystem):
    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        fd = _open_direct(path)
        try:
            with ThreadPoolExecutor(1) as writer, _DigestedFile(fd, writer) as digested:
                yield digested
                self.digests[os.path.basename(path)] = digested.finish()
        finally:
            os.close(fd)

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        if (digest := self.digests.pop(os.path.basename(path), None)) is not None:
            self.digests[os.path.basename(new_path)] = digest


class _Writer(dcp.FileSystemWriter):
    """torch's writer, one file per rank, flushed to disk. It holds one tensor at a time, where torch's holds all of a file's
    until the file is complete; so tensors that are made on demand need the memory of one."""

    def __init__(self, directory: str | os.PathLike):
        super().__init__(directory, single_file_per_rank=True, sync_files=True)
        self.fs = _DigestingFileSystem()
        #: Digests by file name, of files closed so far.
        self.digests = self.fs.digests

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Writes this rank's file and returns a completed future, as torch expects."""
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        results = []
        with self.fs.create_stream(self.fs.concat_path(self.path, name), "wb") as stream:
            for item in plan.items:
                data: Any = planner.resolve_data(item)
                if isinstance(data, Tensor):
                    data = _alone(data)
                results.append(
                    _write_item(self.transforms, stream, data, item, name, self.serialization_format)  # type: ignore[arg-type]
                )
                del data
            os.fsync(stream.fileno())
        future: TorchFuture[list[WriteResult]] = TorchFuture()
        future.set_result(results)
        return future


def _alone(tensor: Tensor) -> Tensor:
    """Returns a tensor in its own CPU memory: saving a view saves its whole storage."""
    tensor = tensor.detach().to(torch.device("cpu"))
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
