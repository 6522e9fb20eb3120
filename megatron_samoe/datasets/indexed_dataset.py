"""Megatron's indexed dataset: token sequences in `.bin`, their offsets in `.idx`, byte for byte the same format."""

from __future__ import annotations

import difflib
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from megatron_samoe.datasets import index_format
from megatron_samoe.datasets.bin_readers import fetch_index, filesystem, is_remote, open_bin
from megatron_samoe.datasets.mapped_file import MappedFile, require_whole
from megatron_samoe.errors import DataError

# Indices up to this many sequences are checked row by row when opened (about 10 ms); of larger ones only the
# ends, and every read is checked anyway. `megatron-samoe inspect-dataset verify` checks all rows of any index.
CHECK_ROWS_UP_TO = 1 << 20


def get_bin_path(path_prefix: str) -> str:
    """Returns the path of the tokens of the dataset at `path_prefix`."""
    return path_prefix + ".bin"


def get_idx_path(path_prefix: str) -> str:
    """Returns the path of the index of the dataset at `path_prefix`."""
    return path_prefix + ".idx"


class IndexedDataset:
    """Random access to the sequences of a dataset.

    `dataset[i]` is sequence i, `dataset[a:b]` a list of sequences, `dataset.get(i, offset, length)` a part of
    one; all numpy arrays of the stored dtype (views of the map: do not write).

    Args:
        path_prefix: path or fsspec URL without `.bin` and `.idx`.
        mmap: map the .bin file; False reads it with ordinary reads.
        index_cache_path: folder for downloaded indices of remote datasets.

    Raises:
        DataError: a file is missing, truncated, foreign, or its header is wrong.
    """

    def __init__(self, path_prefix: str, mmap: bool = True, index_cache_path: str | None = None):
        path_prefix = str(path_prefix)
        self.path_prefix, self.mmap, self._index_cache_path = path_prefix, mmap, index_cache_path
        require_dataset(path_prefix)
        self.bin_path, self.idx_path = get_bin_path(path_prefix), get_idx_path(path_prefix)
        local = fetch_index(self.idx_path, index_cache_path) if is_remote(path_prefix) else self.idx_path
        buffer, header = _map_index(local, self.idx_path)
        self.dtype, self.num_sequences = header.dtype, header.num_sequences
        self.sequence_lengths = np.frombuffer(buffer, "<i4", header.num_sequences, index_format.HEADER_BYTES)
        self.sequence_pointers = np.frombuffer(buffer, "<i8", header.num_sequences, header.pointers_offset)
        self.document_indices = np.frombuffer(buffer, "<i8", header.num_boundaries, header.boundaries_offset)
        self.bin_reader = open_bin(self.bin_path, mmap)
        if self.num_sequences <= CHECK_ROWS_UP_TO:
            self.verify()
        else:
            for end in (slice(1), slice(-1, None)):
                self._check_sequences(end)
            index_format.check_boundaries(self.document_indices[[0, -1]], self.num_sequences, self.idx_path)

    def _check_sequences(self, rows: slice = slice(None)) -> None:
        lengths, pointers = self.sequence_lengths[rows], self.sequence_pointers[rows]
        index_format.check_sequences(lengths, pointers, self.dtype.itemsize, self.bin_reader.num_bytes, self.idx_path)

    def verify(self) -> None:
        """Checks every row of the index against the data; DataError names the first bad one."""
        self._check_sequences()
        index_format.check_boundaries(self.document_indices, self.num_sequences, self.idx_path)

    def first_gap(self) -> tuple[int, int] | None:
        """Returns (sequence, byte where it should begin) of the first that does not follow the one in front of it.

        None if all do; a gap behind the last sequence counts as sequence len(self).
        """
        expected = 0
        for start in range(0, len(self), index_format.CHUNK_ROWS):
            rows = slice(start, start + index_format.CHUNK_ROWS)
            sizes = self.sequence_lengths[rows].astype(np.int64) * self.dtype.itemsize
            ends = np.cumsum(sizes) + expected
            wrong = np.flatnonzero(self.sequence_pointers[rows] != ends - sizes)
            if wrong.size:
                return start + int(wrong[0]), int((ends - sizes)[wrong[0]])
            expected = int(ends[-1])
        return None if expected == self.bin_reader.num_bytes else (len(self), expected)

    def blocks(self) -> Iterator[memoryview | bytes]:
        """Yields the tokens.

        A file whose sequences follow each other is read as it is; others (Megatron's format allows gaps and any order)
        sequence by sequence.
        """
        gap = self.first_gap()
        if gap is not None and gap[0] != len(self):
            yield from (self.get(number).data for number in range(len(self)))
            return
        left = self.num_tokens * self.dtype.itemsize
        with open(self.bin_path, "rb") as source:
            while left:
                block = source.read(min(1 << 22, left))
                if not block:
                    raise DataError(f"{self.bin_path} was truncated while it was read.")
                yield block
                left -= len(block)

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.sequence_lengths.sum(dtype=np.int64))

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, index: int | np.integer | slice) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError("slices of an indexed dataset must be contiguous")
            return [self.get(i) for i in range(start, stop)]
        return self.get(int(index))

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Returns `length` tokens (all that are left if None) of sequence `index` from token `offset` on."""
        require_whole(self.sequence_lengths)
        if not -self.num_sequences <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        available = int(self.sequence_lengths[index])
        length = available - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > available:
            raise IndexError(f"tokens {offset} to {offset + length} of the {available} in sequence {index}")
        start = int(self.sequence_pointers[index]) + offset * self.dtype.itemsize
        return self.bin_reader.read(self.dtype, length, start)

    def document(self, number: int) -> np.ndarray:
        """Returns all tokens of document `number`, its sequences joined."""
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} of {self.num_documents}")
        require_whole(self.document_indices)
        first, last = int(self.document_indices[number]), int(self.document_indices[number + 1])
        return np.concatenate([np.empty(0, self.dtype), *(self.get(i) for i in range(first, last))])

    def __getstate__(self) -> tuple[str, bool, str | None]:
        return self.path_prefix, self.mmap, self._index_cache_path

    def __setstate__(self, state: tuple[str, bool, str | None]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    @staticmethod
    def exists(path_prefix: str) -> bool:
        """Returns whether both files of the dataset exist."""
        paths = (get_idx_path(path_prefix), get_bin_path(path_prefix))
        if is_remote(path_prefix):
            return all(fs.exists(key) for fs, key in map(filesystem, paths))
        return all(map(os.path.isfile, paths))


def _map_index(local: str, shown: str) -> tuple[Any, index_format.IndexHeader]:
    """Returns the mapped bytes of an index and its checked header."""
    with open(local, "rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        header = index_format.parse_header(file.read(index_format.HEADER_BYTES), num_bytes, shown)
        return MappedFile.of(file, shown), header


def require_dataset(path_prefix: str) -> None:
    """Raises DataError, naming the nearest dataset that exists, unless both files of `path_prefix` do."""
    if IndexedDataset.exists(path_prefix):
        return
    if is_remote(path_prefix):
        raise DataError(f"There is no dataset at {path_prefix}: the .bin or the .idx object does not exist.")
    missing = [p for p in (get_bin_path(path_prefix), get_idx_path(path_prefix)) if not os.path.isfile(p)]
    folder = os.path.dirname(path_prefix) or "."
    names = os.listdir(folder) if os.path.isdir(folder) else []
    known = sorted(os.path.join(os.path.dirname(path_prefix), name[:-4]) for name in names if name.endswith(".idx"))
    if path_prefix.endswith((".bin", ".idx")) and path_prefix[:-4] in known:
        hint = f" Leave out the suffix: {path_prefix[:-4]!r}."
    elif near := difflib.get_close_matches(path_prefix, known, n=3, cutoff=0.3):
        hint = f" The nearest existing are {', '.join(map(repr, near))}."
    else:
        hint = f" There is no dataset in {folder!r}." if os.path.isdir(folder) else f" {folder!r} is not a folder."
    if len(missing) == 1 and missing[0].endswith(".idx"):
        hint += " megatron-samoe inspect-dataset repair can rebuild the index from the .bin file."
    raise DataError(f"There is no dataset {path_prefix!r}: {' and '.join(missing)} not found.{hint}")


class IndexedDatasetBuilder:
    """Writes a dataset, in memory that does not grow with it. The files appear under their names only when `finalize` succeeds.

    Args:
        bin_path: the `.bin` file to make.
        dtype: of the stored tokens; see `index_format.optimal_dtype`.
    """

    def __init__(self, bin_path: str | os.PathLike, dtype: Any = np.int32):
        self.dtype = np.dtype(dtype).newbyteorder("<")
        index_format.dtype_code(self.dtype)
        self._bin_path, self._prefix = bin_path, str(bin_path).removesuffix(".bin")
        self._tokens, self._lengths, self._boundaries = (
            open(path, "wb") for path in index_format.partial_paths(self._prefix)
        )
        self._num_sequences = 0
        self.end_document()  # the boundary in front of the first

    def add_item(self, tokens: Any, lengths: Sequence[int] | None = None) -> None:
        """Appends to the current document one sequence, or several of these lengths."""
        values = self._convert(tokens)
        lengths = [values.size] if lengths is None else lengths
        if sum(lengths) != values.size:
            raise DataError(f"A document has {values.size} tokens but its sequence lengths add up to {sum(lengths)}.")
        self._tokens.write(values.data)
        self._lengths.write(np.array(lengths, dtype="<i4").data)
        self._num_sequences += len(lengths)

    def add_document(self, tokens: Any, lengths: Sequence[int]) -> None:
        """Appends a whole document: its tokens, and how many belong to each of its sequences."""
        self.add_item(tokens, lengths)
        self.end_document()

    def end_document(self) -> None:
        """Ends the document made by `add_item`."""
        self._boundaries.write(struct.pack("<q", self._num_sequences))

    def add_index(self, path_prefix: str) -> None:
        """Appends all documents of a dataset of the same dtype, of which every row is checked."""
        other = IndexedDataset(path_prefix)
        other.verify()
        if other.dtype != self.dtype:
            raise DataError(f"{path_prefix} stores {other.dtype} tokens and cannot be joined to {self.dtype} ones.")
        for block in other.blocks():
            self._tokens.write(block)
        for rows in index_format.in_chunks(other.sequence_lengths):
            self._lengths.write(rows.data)
        for rows in index_format.in_chunks(other.document_indices[1:]):
            self._boundaries.write((rows + self._num_sequences).data)
        self._num_sequences += len(other)

    def finalize(self, idx_path: str | os.PathLike, before_naming: Callable[[], object] = lambda: None) -> None:
        """Writes the index and gives both files their names.

        Args:
            before_naming: is called when both are written, before files of these names are replaced.
        """
        self._tokens.flush()
        os.fsync(self._tokens.fileno())
        for file in (self._tokens, self._lengths, self._boundaries):
            file.close()
        index = index_format.write_partial_index(self._prefix, self.dtype)
        before_naming()
        os.replace(self._tokens.name, self._bin_path)
        os.replace(index, idx_path)
        os.unlink(self._lengths.name)
        os.unlink(self._boundaries.name)

    def _convert(self, tokens: Any) -> np.ndarray:
        values = np.asarray(tokens)
        if values.size and self.dtype.kind in "iu" and values.dtype != self.dtype:
            if values.dtype.kind not in "iu":
                raise DataError(f"Tokens must be integers, not {values.dtype}.")
            info, low, high = np.iinfo(self.dtype), int(values.min()), int(values.max())
            if low < info.min or high > info.max:
                raise DataError(
                    f"Token id {low if low < info.min else high} does not fit {self.dtype} "
                    f"({info.min} to {info.max}): choose a wider dtype."
                )
        return np.ascontiguousarray(values.reshape(-1), dtype=self.dtype)
