"""Joins datasets into one by streaming: the memory does not grow with the data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from megatron_samoe.datasets import manifest
from megatron_samoe.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
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
    """Writes the documents of the datasets, in order, as one dataset. Data and index appear only when complete, the manifest after them.

    Raises DataError if a dataset is missing or damaged, if dtypes or tokenizers differ, or if the output is an input.
    """
    if not prefixes:
        raise DataError("There is nothing to merge.")
    if os.path.abspath(output_prefix) in map(os.path.abspath, prefixes):
        raise DataError(f"The output {output_prefix!r} is also an input.")
    records = [manifest.read(prefix) for prefix in prefixes]
    dtype = _check_alike(prefixes, records)
    builder = IndexedDatasetBuilder(f"{output_prefix}.bin", dtype)
    for prefix in prefixes:
        builder.add_index(prefix)
    replaced = Path(manifest.get_manifest_path(output_prefix))
    builder.finalize(f"{output_prefix}.idx", before_naming=partial(replaced.unlink, missing_ok=True))
    known = [record for record in records if record is not None]
    if len(known) == len(records):
        manifest.write(output_prefix, _joined(prefixes, known, f"{output_prefix}.idx"))


def _check_alike(prefixes: Sequence[str], records: Sequence[manifest.Manifest | None]) -> np.dtype:
    """Returns the dtype of the tokens of all datasets."""
    prints = {p: r.tokenizer_fingerprint[:12] for p, r in zip(prefixes, records, strict=True) if r is not None}
    dtypes = {prefix: IndexedDataset(prefix).dtype for prefix in prefixes}
    for what, values in (("token dtypes", dtypes), ("tokenizers", prints)):
        if len(set(values.values())) > 1:
            listing = ", ".join(f"{prefix} ({value})" for prefix, value in values.items())
            raise DataError(f"Datasets of different {what} cannot be merged: {listing}.")
    return dtypes[prefixes[0]]


def _joined(prefixes: Sequence[str], records: Sequence[manifest.Manifest], index_path: str) -> manifest.Manifest:
    """Returns the manifest of joined datasets that all have one."""
    summed = ("num_documents", "num_sequences", "num_tokens", "bin_bytes")
    crc, counts = 0, Counter[str]()
    for record in records:
        crc = checksums.combine(crc, record.bin_crc32, record.bin_bytes)
        counts.update(record.counts)
    return replace(
        records[0],
        **{name: sum(getattr(record, name) for record in records) for name in summed},  # type: ignore[arg-type]
        max_token_id=max(r.max_token_id for r in records),
        bin_crc32=crc,
        idx_crc32=checksums.file_crc32(index_path),
        options={"merged": [os.path.basename(prefix) for prefix in prefixes]},
        inputs=[entry for record in records for entry in record.inputs],
        counts=dict(counts),
    )
