"""The files under construction. Workers write to offsets that the coordinator gives them; nobody writes in between."""

from __future__ import annotations

import errno
import os
import zlib
from dataclasses import dataclass

import numpy as np

from megatron_samoe.datasets.index_format import partial_paths
from megatron_samoe.datasets.preprocess.encode import Column

#: How a system says that a disk, a quota, or the size that a file may have is exhausted.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Position:
    """Where the next chunk of one key goes: counts of what is in front of it."""

    num_bytes: int = 0
    num_sequences: int = 0
    num_documents: int = 0

    @property
    def offsets(self) -> tuple[int, int, int]:
        """Bytes in front of it in the files of `partial_paths`; boundaries begin with a 0."""
        return self.num_bytes, 4 * self.num_sequences, 8 * (1 + self.num_documents)

    def after(self, num_bytes: int, num_sequences: int, num_documents: int) -> Position:
        """Returns the offsets after a chunk of these sizes."""
        return Position(
            self.num_bytes + num_bytes, self.num_sequences + num_sequences, self.num_documents + num_documents
        )


@dataclass(frozen=True)
class Written:
    """Sizes and checksums of one key of one chunk, for the journal."""

    num_bytes: int
    num_sequences: int
    num_documents: int
    max_token_id: int
    bin_crc32: int
    lengths_crc32: int
    boundaries_crc32: int

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Bytes and checksum in each of the files of `partial_paths`."""
        return (
            (self.num_bytes, self.bin_crc32),
            (4 * self.num_sequences, self.lengths_crc32),
            (8 * self.num_documents, self.boundaries_crc32),
        )


class ShardWriter:
    """Writes chunks of one key at given offsets of the three files, which it opens at the first write."""

    def __init__(self, prefix: str):
        self._paths = partial_paths(prefix)
        self._files: list[int] = []

    def write(self, column: Column, position: Position) -> Written:
        """Writes one chunk and returns its sizes and checksums."""
        if not self._files:
            self._files = [os.open(path, os.O_WRONLY) for path in self._paths]
        boundaries = np.cumsum(column.sequences, dtype=np.int64) + position.num_sequences
        arrays, crcs = (column.tokens, column.lengths, boundaries), []
        for file, array, offset in zip(self._files, arrays, position.offsets, strict=True):
            view = np.ascontiguousarray(array).view(np.uint8).data
            crcs.append(zlib.crc32(view))
            done = 0
            while done < len(view):
                done += os.pwrite(file, view[done:], offset + done)
        top = int(column.tokens.max()) if column.tokens.size else -1
        return Written(column.tokens.nbytes, len(column.lengths), len(boundaries), top, *crcs)

    def close(self) -> None:
        for file in self._files:
            os.close(file)
        self._files = []
