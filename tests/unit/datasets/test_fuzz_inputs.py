"""Mutated corpora: a clear error or a right answer, never a crash, a hang, or more memory than the input explains."""

from __future__ import annotations

import gzip
import io
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from megatron_samoe.datasets.indexed_dataset import IndexedDataset
from megatron_samoe.datasets.inspect import verify
from megatron_samoe.datasets.preprocess.run import preprocess
from megatron_samoe.errors import DataError
from tests.harness.datasets import decoded, jsonl, options
from tests.hostile.changes import mutate

# Mutations per kind of file; 10000 in all with SAMOE_FUZZ=3000.
NUM_MUTATIONS = int(os.environ.get("SAMOE_FUZZ", "120"))
TEXTS = [f"document {n} " + "words and words " * (n % 5) for n in range(40)]
JSONL = jsonl(TEXTS)


def _parquet() -> bytes:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), sink, row_group_size=16)
    return sink.getvalue()


def _zstd() -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(JSONL)


KINDS = {
    ".jsonl": lambda: JSONL,
    ".parquet": _parquet,
    ".jsonl.zst": _zstd,
    ".jsonl.gz": lambda: gzip.compress(JSONL, mtime=0),
}


@pytest.mark.parametrize("suffix", KINDS)
def test_mutated_inputs(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # most of the time
    good, random = KINDS[suffix](), np.random.default_rng(7)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {"error": 0, "answer": 0}
    for number in range(NUM_MUTATIONS):
        path = tmp_path / f"in{suffix}"
        path.write_bytes(mutate(good, random) if number else good)
        try:
            report = preprocess(options(tmp_path, path.name, chunk_bytes=2048, on_bad_input="skip"))
        except DataError as error:
            assert len(str(error)) < 2000
            outcomes["error"] += 1
            continue
        outcomes["answer"] += 1
        assert report.totals.num_lines >= report.num_documents
        if number % 10 == 0:
            verify(str(tmp_path / "out_text_document"))
        documents = IndexedDataset(str(tmp_path / "out_text_document")).num_documents
        assert documents == report.num_documents
        assert number or decoded(tmp_path / "out_text_document") == TEXTS
    assert outcomes["answer"] > 0, outcomes
    peak_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert peak_mb < 400, f"{peak_mb} MB for an input of {len(good)} bytes"
