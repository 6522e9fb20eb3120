"""Files of torch.distributed.checkpoint: written with digests, and read without running code from them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from blake3 import blake3
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    Metadata,
    StorageMeta,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future as TorchFuture

from megatron_samoe.dist_checkpointing.saved_tensor import read_saved_tensor_into
from megatron_samoe.dist_checkpointing.table_of_contents import read_metadata

BLOCK_BYTES = 4 << 20
#: Below this, finding where a tensor begins takes longer than a copy.
DIRECT_BYTES = 4 << 20
#: Threads that read such tensors: most of the time goes into copies of what verifying has left in memory.
READERS = 2
#: Of a file that is being written: few and large, since each waits for a thread to have a core.
WRITTEN_BYTES = 4 << 20
NUM_BLOCKS = 3


class Reader(dcp.FileSystemReader):
    """torch's reader, with a table of contents that cannot run code. torch itself reads tensors with weights_only.

    Large tensors that are read whole go straight from the file to their place; torch's own reader needs their memory
    twice.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Returns the table of contents."""
        metadata = read_metadata(self.path)
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> TorchFuture[None]:
        """Fills the tensors of a plan and returns a completed future, as torch expects."""
        with ThreadPoolExecutor(READERS) as readers:
            is_read = list(readers.map(lambda item: self._read_directly(item, planner), plan.items))
        rest = [item for item, done in zip(plan.items, is_read, strict=True) if not done]
        return super().read_data(replace(plan, items=rest), planner)

    def _read_directly(self, item: ReadItem, planner: LoadPlanner) -> bool:
        stored = self.storage_data[item.storage_index]
        if item.type != LoadItemType.TENSOR or stored.length < DIRECT_BYTES or stored.transform_descriptors:
            return False
        target = planner.resolve_tensor(item).detach()
        with open(os.path.join(self.path, stored.relative_path), "rb", buffering=0) as file:
            if any(item.storage_offsets) or not read_saved_tensor_into(target, file, stored.offset, stored.length):
                return False
        planner.commit_tensor(item, target)
        return True


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
    """Writes bytes that begin at a page of memory and, but for the last ones of a file, end at one."""
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


class Writer(dcp.FileSystemWriter):
    """torch's writer, one file per rank, flushed to disk; `digests` has the digest of each file this rank wrote."""

    def __init__(self, directory: str | os.PathLike):
        super().__init__(directory, single_file_per_rank=True, sync_files=True)
        self.fs = _DigestingFileSystem()
        #: Digests by file name, of files closed so far.
        self.digests = self.fs.digests


def new_digest(like: str = "") -> Any:
    """Returns a new digest object for a file's bytes: BLAKE3, at some 4 GB/s on one core.

    Args:
        like: a digest of the wanted kind; older checkpoints have sha256, and the first ones blake2b of 16 bytes.
    """
    if like and not like.startswith(_Blake3.PREFIX):
        return hashlib.blake2b(digest_size=16) if len(like) == 32 else hashlib.sha256()
    return _Blake3()


class _Blake3:
    """BLAKE3 with the methods of hashlib's digests. Its hexadecimal digest begins with its kind; the rest is that of
    the command b3sum.
    """

    PREFIX = "blake3:"

    def __init__(self) -> None:
        self._hasher = blake3()

    def update(self, data: bytes | bytearray | memoryview) -> None:
        self._hasher.update(data)

    def hexdigest(self) -> str:
        return self.PREFIX + self._hasher.hexdigest()


def digest_of(path: Path, like: str = "") -> str:
    """Returns a file's digest, of the same kind as `like`; the next block is read while one is digested."""
    digest = new_digest(like)
    with ThreadPoolExecutor(1) as reader, open(path, "rb", buffering=0) as file:
        block, spare = bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)
        size = file.readinto(block)
        while size:
            ahead = reader.submit(file.readinto, spare)
            digest.update(memoryview(block)[:size])
            block, spare, size = spare, block, ahead.result()
    return digest.hexdigest()
