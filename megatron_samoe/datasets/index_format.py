"""The `.idx` file of Megatron's indexed datasets: header, checks, and a writer whose memory does not grow.

Little-endian, no padding:

    offset      bytes   content
    0           9       MMIDIDX\\0\\0
    9           8       uint64, version 1
    17          1       dtype code of the tokens in .bin
    18          8       uint64, S sequences
    26          8       uint64, D = documents + 1
    34          4 S     int32, tokens per sequence
    34 + 4 S    8 S     int64, byte offset of each sequence in .bin
    34 + 12 S   8 D     int64, document boundaries counted in sequences; the first is 0, the last S
    then        S       int8, modes: only in multimodal datasets, read past and ignored here
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from megatron_samoe.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name) for code, name in enumerate(("<u1", "<i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), 1)
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# Below this vocabulary size Megatron's tools write uint16 (the threshold is 65500, not 65536).
UINT16_VOCAB_LIMIT = 65500
# Rows handled at once when an index is written or checked: bounds the memory of both.
CHUNK_ROWS = 1 << 20


def optimal_dtype(vocab_size: int | None) -> np.dtype[Any]:
    """Returns the dtype that Megatron's tools choose for a vocabulary: uint16 below 65500 entries, else int32."""
    return DTYPES[8] if vocab_size is not None and vocab_size < UINT16_VOCAB_LIMIT else DTYPES[4]


def dtype_code(dtype: Any) -> int:
    """Returns the code that stands for `dtype` in an index; DataError if the format has none."""
    wanted = np.dtype(dtype).newbyteorder("<")
    if wanted not in CODES:
        allowed = ", ".join(str(d) for d in DTYPES.values())
        raise DataError(f"Tokens of dtype {wanted} cannot be stored in an indexed dataset; allowed are {allowed}.")
    return CODES[wanted]


@dataclass(frozen=True)
class IndexHeader:
    """The fixed part of an index, and where its arrays begin (offsets in bytes)."""

    dtype: np.dtype[Any]
    num_sequences: int
    num_boundaries: int

    @property
    def pointers_offset(self) -> int:
        return HEADER_BYTES + 4 * self.num_sequences

    @property
    def boundaries_offset(self) -> int:
        return HEADER_BYTES + 12 * self.num_sequences

    @property
    def total_bytes(self) -> int:
        return self.boundaries_offset + 8 * self.num_boundaries

    def pack(self) -> bytes:
        """Returns the 34 bytes of the header."""
        return MAGIC + struct.pack("<QBQQ", VERSION, dtype_code(self.dtype), self.num_sequences, self.num_boundaries)


def parse_header(head: bytes, file_bytes: int, path: str) -> IndexHeader:
    """Returns the header held in the first 34 bytes of an index of `file_bytes` bytes.

    Nothing is allocated from the counts before they are compared with the file's size, so a lying header
    costs nothing. Raises DataError that names what is wrong.
    """
    if len(head) < HEADER_BYTES:
        raise DataError(
            f"{path} is not a dataset index: it has {file_bytes} bytes, and the header needs {HEADER_BYTES}. "
            "It is truncated or another kind of file."
        )
    if head[:9] != MAGIC:
        raise DataError(
            f"{path} is not a dataset index: it starts with {head[:9]!r} where {MAGIC!r} is expected. "
            "It was made by another program, or is not the .idx of an indexed dataset."
        )
    version, code, num_sequences, num_boundaries = struct.unpack("<QBQQ", head[9:HEADER_BYTES])
    if version != VERSION:
        raise DataError(f"{path} has index version {version}; only version {VERSION} is known.")
    if code not in DTYPES:
        raise DataError(f"{path} names dtype code {code}; known are {', '.join(map(str, DTYPES))}.")
    header = IndexHeader(DTYPES[code], num_sequences, num_boundaries)
    if file_bytes not in (header.total_bytes, header.total_bytes + num_sequences):
        relation = "truncated" if file_bytes < header.total_bytes else "too long"
        raise DataError(
            f"{path} is {relation}: its header announces {num_sequences} sequences and {num_boundaries} document "
            f"boundaries, which take {header.total_bytes} bytes, but the file has {file_bytes}. "
            "megatron-samoe inspect-dataset repair can rebuild an index from the .bin file."
        )
    if num_boundaries < 1:
        raise DataError(f"{path} has no document boundary; an index without documents still has the boundary 0.")
    return header


def check_sequences(lengths: np.ndarray, pointers: np.ndarray, itemsize: int, bin_bytes: int, path: str) -> None:
    """Checks every sequence of an index against the size of its data; raises DataError naming the first bad row."""
    for start in range(0, len(lengths), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        length, pointer = lengths[rows].astype(np.int64), pointers[rows]
        # Written so that hostile 64-bit values cannot overflow: nothing is added to a pointer.
        room = bin_bytes - length * itemsize
        bad = np.flatnonzero((length < 0) | (pointer < 0) | (pointer > room))
        if bad.size:
            row = start + int(bad[0])
            raise DataError(
                f"{path}: sequence {row} claims {int(lengths[row])} tokens at byte {int(pointers[row])}, "
                f"outside the {bin_bytes} bytes of the .bin file. The index and the data do not belong together, "
                "or one is damaged."
            )


def check_boundaries(boundaries: np.ndarray, num_sequences: int, path: str) -> None:
    """Checks that document boundaries run from 0 to the number of sequences without going back."""
    if int(boundaries[0]) != 0 or int(boundaries[-1]) != num_sequences:
        raise DataError(
            f"{path}: document boundaries run from {int(boundaries[0])} to {int(boundaries[-1])}, "
            f"but must run from 0 to the {num_sequences} sequences of the dataset."
        )
    for start in range(0, len(boundaries) - 1, CHUNK_ROWS):
        rows = boundaries[start : start + CHUNK_ROWS + 1]
        back = np.flatnonzero(rows[1:] < rows[:-1])
        if back.size:
            raise DataError(f"{path}: document boundary {start + int(back[0]) + 1} is before the one in front of it.")


def partial_paths(prefix: str) -> tuple[str, str, str]:
    """Returns the paths of tokens, sequence lengths (int32) and document boundaries (int64) while a dataset is made."""
    return f"{prefix}.bin.partial", f"{prefix}.lengths.partial", f"{prefix}.boundaries.partial"


def write_partial_index(prefix: str, dtype: Any) -> str:
    """Writes the index of the files of `partial_paths`, and returns its path, which ends with `.partial` too."""
    _, lengths, boundaries = partial_paths(prefix)
    write_index(f"{prefix}.idx.partial", dtype, _mapped_rows(lengths, "<i4"), _mapped_rows(boundaries, "<i8"))
    return f"{prefix}.idx.partial"


def _mapped_rows(path: str, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r") if os.path.getsize(path) else np.empty(0, dtype=dtype)


def write_index(path: str | os.PathLike, dtype: Any, lengths: np.ndarray, boundaries: np.ndarray) -> None:
    """Writes an index for sequences that follow each other in .bin without gaps.

    Args:
        dtype: of the tokens.
        lengths: tokens per sequence, int32; may be a memory map.
        boundaries: int64 document boundaries with the leading 0; may be a memory map.
    """
    header = IndexHeader(np.dtype(dtype), len(lengths), len(boundaries))
    with open(path, "wb") as file:
        file.write(header.pack())
        _write_rows(file, lengths, "<i4")
        pointer = 0
        for rows in in_chunks(lengths):
            nbytes = rows.astype(np.int64) * header.dtype.itemsize
            ends = np.cumsum(nbytes) + pointer
            file.write((ends - nbytes).astype("<i8").data)
            pointer = int(ends[-1])
        _write_rows(file, boundaries, "<i8")
        file.flush()
        os.fsync(file.fileno())


def in_chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yields CHUNK_ROWS rows at a time."""
    for start in range(0, len(rows), CHUNK_ROWS):
        yield rows[start : start + CHUNK_ROWS]


def _write_rows(file: BinaryIO, rows: np.ndarray, dtype: str) -> None:
    for chunk in in_chunks(rows):
        file.write(np.ascontiguousarray(chunk, dtype=dtype).data)
