"""Joins datasets into one by streaming: the memory does not grow with the data."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from megatron_samoe.datasets import index_format, manifest
from megatron_samoe.datasets.indexed_dataset import IndexedDataset
from megatron_samoe.datasets.preprocess import checksums
from megatron_samoe.errors import DataError


def find_datasets(words: Sequence[str]) -> list[str]:
    """Returns the prefixes that words name: prefixes as they are, folders as their datasets, sorted by name."""
    prefixes: list[str] = []
    for word in words:
        if os.path.isdir(word):
            found = sorted(os.path.join(word, name[:-4]) for name in os.listdir(word) if name.endswith(".idx"))
            if not found:
                raise DataError(f"The folder {word!r} holds no dataset (no .idx file).")
            prefixes.extend(found)
        else:
            prefixes.append(word.removesuffix(".idx").removesuffix(".bin"))
    return prefixes


def merge(prefixes: Sequence[str], output_prefix: str) -> None:
    """Writes the documents of the datasets, in order, as one dataset. It appears only when complete.

    Raises DataError if a dataset is missing or damaged, if dtypes or tokenizers differ, or if the output is an input.
    """
    if not prefixes:
        raise DataError("There is nothing to merge.")
    if os.path.abspath(output_prefix) in map(os.path.abspath, prefixes):
        raise DataError(f"The output {output_prefix!r} is also an input.")
    records = [manifest.read(prefix) for prefix in prefixes]
    _check_alike(prefixes, records)
    crc, rows = 0, np.zeros(2, dtype=np.int64)
    parts = [f"{output_prefix}.{part}.partial" for part in ("bin", "lengths", "boundaries")]
    with open(parts[0], "wb") as tokens, open(parts[1], "wb") as lengths, open(parts[2], "wb") as boundaries:
        boundaries.write(b"\0" * 8)
        for prefix in prefixes:
            data = IndexedDataset(prefix)
            data.verify()
            for block in _blocks(data):
                crc = zlib.crc32(block, crc)
                tokens.write(block)
            for start in range(0, len(data), index_format.CHUNK_ROWS):
                lengths.write(data.sequence_lengths[start : start + index_format.CHUNK_ROWS].tobytes())
            for start in range(1, data.num_documents + 1, index_format.CHUNK_ROWS):
                boundaries.write((data.document_indices[start : start + index_format.CHUNK_ROWS] + rows[0]).tobytes())
            rows += len(data), data.num_documents
        tokens.flush()
        os.fsync(tokens.fileno())
    dtype = data.dtype
    length_rows = np.memmap(parts[1], dtype="<i4", mode="r") if rows[0] else np.empty(0, dtype="<i4")
    index_path = f"{output_prefix}.idx.partial"
    index_format.write_index(index_path, dtype, length_rows, np.memmap(parts[2], dtype="<i8", mode="r"))
    _write_manifest(output_prefix, prefixes, records, crc, os.path.getsize(parts[0]), index_path)
    os.replace(parts[0], f"{output_prefix}.bin")
    os.replace(index_path, f"{output_prefix}.idx")
    for part in parts[1:]:
        os.unlink(part)


def _check_alike(prefixes: Sequence[str], records: Sequence[manifest.Manifest | None]) -> None:
    prints = {p: r.tokenizer_fingerprint[:12] for p, r in zip(prefixes, records, strict=True) if r is not None}
    dtypes = {prefix: str(IndexedDataset(prefix).dtype) for prefix in prefixes}
    for what, values in (("token dtypes", dtypes), ("tokenizers", prints)):
        if len(set(values.values())) > 1:
            listing = ", ".join(f"{prefix} ({value})" for prefix, value in values.items())
            raise DataError(f"Datasets of different {what} cannot be merged: {listing}.")


def _blocks(data: IndexedDataset) -> Iterator[bytes]:
    """Yields the tokens of a dataset.

    One whose sequences follow each other is read as it is; others (Megatron's format allows gaps and any order)
    sequence by sequence.
    """
    gap = data.first_gap()
    if gap is not None and gap[0] != len(data):
        yield from (data.get(number).tobytes() for number in range(len(data)))
        return
    left = data.num_tokens * data.dtype.itemsize
    with open(data.bin_path, "rb") as source:
        while left:
            block = source.read(min(1 << 22, left))
            if not block:
                raise DataError(f"{data.bin_path} was truncated while it was read.")
            yield block
            left -= len(block)


def _write_manifest(
    output_prefix: str,
    prefixes: Sequence[str],
    records: Sequence[manifest.Manifest | None],
    crc: int,
    bin_bytes: int,
    index_path: str,
) -> None:
    """Writes the manifest of the result where all inputs have one; otherwise removes an old one."""
    known = [record for record in records if record is not None]
    if len(known) < len(records):
        path = manifest.get_manifest_path(output_prefix)
        if os.path.exists(path):
            os.unlink(path)
        return
    counts: dict[str, int] = {}
    for name, value in (pair for record in known for pair in record.counts.items()):
        counts[name] = counts.get(name, 0) + value
    sums = {
        name: sum(getattr(record, name) for record in known)
        for name in ("num_documents", "num_sequences", "num_tokens")
    }
    joined = replace(
        known[0],
        **sums,  # type: ignore[arg-type]
        max_token_id=max(r.max_token_id for r in known),
        bin_bytes=bin_bytes,
        bin_crc32=crc,
        idx_crc32=checksums.file_crc32(index_path),
        options={"merged": [os.path.basename(prefix) for prefix in prefixes]},
        inputs=[entry for record in known for entry in record.inputs],
        counts=counts,
    )
    manifest.write(output_prefix, joined)
