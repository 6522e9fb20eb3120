"""Digests of a checkpoint's files, and the reading of parts of a file while it is digested."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

from blake3 import blake3

#: Of a file that is digested: a block is still in the processor's cache when it is digested.
BLOCK_BYTES = 1 << 20
BLOCKS_AHEAD = 6
#: Threads that read a file.
READERS = 2


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


@dataclass(frozen=True)
class Target:
    """Memory for a part of a file.

    Attributes:
        offset: where the part begins in the file.
        filled: called when the memory has the part.
    """

    offset: int
    memory: memoryview
    filled: Callable[[], None] = lambda: None


def digest_of(
    path: Path, like: str = "", targets: Callable[[io.FileIO], Iterator[Target]] = lambda file: iter(())
) -> str:
    """Returns a file's digest, of the same kind as `like`, and fills targets with the bytes that were digested.

    Each byte is read once. Threads read ahead, since to take pages from the system costs more than to digest them.

    Args:
        targets: returns them for the open file, in its order and without overlaps. Each is asked for some blocks before its
            bytes are read, all of them before the end. Those beyond the file's end are not filled.
    """
    digest = new_digest(like)
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(READERS) as readers:
        fd = file.fileno()
        # In the file's order the system reads far ahead, in requests as large as the disk takes.
        advise(fd, "SEQUENTIAL")
        blocks = _blocks(os.fstat(fd).st_size, targets(file))
        pending = deque[tuple[Target, Future[memoryview]]]()
        while True:
            for block in islice(blocks, BLOCKS_AHEAD - len(pending)):
                pending.append((block, readers.submit(read_up_to, block.memory, fd, block.offset)))
            if not pending:
                break
            block, reading = pending.popleft()
            digest.update(read := reading.result())
            if len(read) < len(block.memory):
                break  # the file became shorter
            block.filled()
    return digest.hexdigest()


def _blocks(size: int, targets: Iterator[Target]) -> Iterator[Target]:
    """Yields a file's bytes in order as blocks: those of targets in their memory, all else in memory that is used again."""
    position = 0
    spare = cycle([memoryview(bytearray(min(size, BLOCK_BYTES))) for _ in range(BLOCKS_AHEAD + 1)])
    for target in chain(targets, [Target(size, memoryview(b""))]):
        for start in range(position, target.offset, BLOCK_BYTES):
            yield Target(start, next(spare)[: target.offset - start])
        for start in range(0, len(target.memory), BLOCK_BYTES):
            yield Target(target.offset + start, target.memory[start : start + BLOCK_BYTES])
        position = target.offset + len(target.memory)
        yield Target(position, memoryview(b""), target.filled)


def read_up_to(memory: memoryview, fd: int, offset: int) -> memoryview:
    """Returns what a file has from an offset on, as much as fits into the memory."""
    size = 0
    while size < len(memory) and (count := os.preadv(fd, [memory[size:]], offset + size)):
        size += count
    return memory[:size]


def advise(fd: int, advice: str, offset: int = 0, length: int = 0) -> None:
    """Says how a part of a file will be read, by a name of posix_fadvise, to a system that takes such advice (macOS does not)."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, offset, length, getattr(os, f"POSIX_FADV_{advice}"))


def is_damage(error: OSError) -> bool:
    """Whether a file, or its disk, is at fault: all else is of this host, such as too many open files, and may be well later."""
    return error.errno in (None, 0, errno.EIO)
