"""Looks at datasets: statistics, histograms, single documents, verification, and repair of a lost index."""

from __future__ import annotations

import os

import numpy as np

from megatron_samoe.datasets import index_format, manifest
from megatron_samoe.datasets.indexed_dataset import IndexedDataset, get_bin_path, get_idx_path
from megatron_samoe.datasets.preprocess import checksums
from megatron_samoe.errors import DataError
from megatron_samoe.parsing import JsonObject

# Bytes of .bin looked at together.
BLOCK_BYTES = 1 << 24


def document_lengths(data: IndexedDataset) -> np.ndarray:
    """Returns the tokens of each document, int64 [documents]."""
    ends = np.concatenate(([0], np.cumsum(data.sequence_lengths, dtype=np.int64)))
    return np.diff(ends[data.document_indices])


def token_counts(data: IndexedDataset) -> np.ndarray:
    """Returns how often each id occurs, int64 [largest id + 1]; DataError if an id is negative."""
    if data.dtype.kind not in "iu":
        raise DataError(f"{data.bin_path} holds {data.dtype} values, which are not token ids.")
    counts, itemsize = np.zeros(0, dtype=np.int64), data.dtype.itemsize
    block, num_items = BLOCK_BYTES // itemsize, data.bin_reader.num_bytes // itemsize
    for start in range(0, num_items, block):
        tokens = data.bin_reader.read(data.dtype, min(block, num_items - start), start * itemsize)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0:
            raise DataError(f"{data.bin_path} holds the negative id {low}.")
        if high > 1 << 26:
            raise DataError(f"{data.bin_path} holds the id {high}, which no vocabulary has.")
        counts = np.pad(counts, (0, max(0, high + 1 - len(counts))))
        counts += np.bincount(tokens, minlength=len(counts))
    return counts


def statistics(data: IndexedDataset) -> JsonObject:
    """Returns counts and quantiles of a dataset."""
    lengths, counts = document_lengths(data), token_counts(data)
    total = int(counts.sum())
    quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1]).astype(int).tolist() if len(lengths) else []
    shares = counts[counts > 0] / max(total, 1)
    return {
        "dtype": str(data.dtype),
        "documents": data.num_documents,
        "empty_documents": int((lengths == 0).sum()),
        "sequences": len(data),
        "tokens": data.num_tokens,
        "bin_bytes": data.bin_reader.num_bytes,
        "document_tokens": dict(zip(("min", "p10", "median", "p90", "max"), quantiles, strict=False)),
        "mean_document_tokens": round(float(lengths.mean()), 2) if len(lengths) else 0.0,
        "distinct_ids": int((counts > 0).sum()),
        "max_token_id": len(counts) - 1,
        "unigram_entropy_nats": round(float(-(shares * np.log(shares)).sum()), 4),
    }


def plot(data: IndexedDataset, path: str) -> None:
    """Draws histograms of document lengths and of ids (frequency by rank) to a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths, counts = document_lengths(data), token_counts(data)
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    filled = lengths[lengths > 0]
    if len(filled):
        top = max(int(filled.max()), 2)
        left.hist(filled, bins=np.unique(np.geomspace(1, top + 1, 50).astype(int)))
    left.set(xscale="log", xlabel="tokens per document", ylabel="documents")
    ranked = np.sort(counts[counts > 0])[::-1]
    if len(ranked):
        right.loglog(np.arange(1, len(ranked) + 1), ranked)
    right.set(xlabel="rank of the id", ylabel="occurrences")
    figure.suptitle(os.path.basename(data.path_prefix))
    figure.savefig(path, dpi=120)


def verify(prefix: str) -> list[str]:
    """Returns what was checked; DataError names the first thing that is wrong.

    Every row of the index is held against the size of the data, gaps and overlaps are looked for, and, where a manifest
    is there, counts and checksums are compared.
    """
    data = IndexedDataset(prefix)
    data.verify()
    done = [
        f"header, {len(data)} sequences and {data.num_documents} documents lie inside {data.bin_reader.num_bytes} bytes"
    ]
    itemsize, num_bytes = data.dtype.itemsize, data.bin_reader.num_bytes
    if num_bytes % itemsize:
        raise DataError(f"{data.bin_path} has {num_bytes} bytes, no multiple of {itemsize}.")
    if (gap := data.first_gap()) is not None:
        row, expected = gap
        if row == len(data):
            raise DataError(f"{data.bin_path} has {num_bytes} bytes, but its index describes {expected}.")
        begin = int(data.sequence_pointers[row])
        raise DataError(
            f"{data.idx_path}: sequence {row} begins at byte {begin}, but the one in front of it ends at {expected}."
        )
    done.append("sequences follow each other without gaps and fill the data")
    record = manifest.read(prefix)
    if record is None:
        return [*done, "no manifest: checksums are not known"]
    found = (len(data), data.num_documents, data.num_tokens)
    if found != (record.num_sequences, record.num_documents, record.num_tokens):
        raise DataError(
            f"{prefix} holds {found[0]} sequences, {found[1]} documents, {found[2]} tokens; its manifest says "
            f"{record.num_sequences}, {record.num_documents}, {record.num_tokens}."
        )
    for path, crc in ((data.bin_path, record.bin_crc32), (data.idx_path, record.idx_crc32)):
        if checksums.file_crc32(path) != crc:
            raise DataError(f"{path} differs from what was written: its checksum is not that of the manifest.")
    return [*done, "counts and checksums are those of the manifest"]


def repair(prefix: str, dtype: str, eod: int) -> tuple[int, int]:
    """Rebuilds `.idx` from `.bin`: a document ends with each `eod`; returns (documents, tokens).

    What the data do not say is lost: sentence borders and documents without tokens. The old index, if any, is kept
    as `.idx.broken`. Refuses data whose size is not a multiple of the dtype's, or that hold no `eod`.
    """
    path = get_bin_path(prefix)
    kind = np.dtype(dtype).newbyteorder("<")
    index_format.dtype_code(kind)
    if not os.path.isfile(path):
        raise DataError(f"{path} does not exist: there is nothing to rebuild the index from.")
    num_bytes = os.path.getsize(path)
    if num_bytes == 0 or num_bytes % kind.itemsize:
        raise DataError(f"{path} has {num_bytes} bytes, no multiple of the {kind.itemsize} that a {dtype} token takes.")
    tokens = np.memmap(path, dtype=kind, mode="r")
    block = BLOCK_BYTES // kind.itemsize
    ends = [np.flatnonzero(tokens[s : s + block] == eod) + s + 1 for s in range(0, len(tokens), block)]
    borders = np.concatenate(ends)
    if not len(borders):
        raise DataError(f"{path} holds no end-of-document token {eod}: its documents cannot be separated.")
    if borders[-1] != len(tokens):
        borders = np.append(borders, len(tokens))
    lengths = np.diff(borders, prepend=0)
    if int(lengths.max()) > np.iinfo(np.int32).max:
        raise DataError(f"{path}: a document would have {int(lengths.max())} tokens, more than the format holds.")
    index = get_idx_path(prefix)
    index_format.write_index(f"{index}.partial", kind, lengths.astype("<i4"), np.arange(len(lengths) + 1, dtype="<i8"))
    if os.path.exists(index):
        os.replace(index, f"{index}.broken")
    os.replace(f"{index}.partial", index)
    return len(lengths), len(tokens)
