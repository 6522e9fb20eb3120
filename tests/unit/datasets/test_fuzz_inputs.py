"""Mutated corpora: a clear error or a right answer, never a crash, a hang, or more memory than the input explains."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_samoe.datasets.indexed_dataset import IndexedDataset
from megatron_samoe.datasets.inspect import verify
from megatron_samoe.datasets.preprocess.options import PreprocessOptions
from megatron_samoe.datasets.preprocess.run import preprocess
from megatron_samoe.errors import DataError
from tests.hostile.changes import mutate

# Mutations per kind of file; 10000 in all with SAMOE_FUZZ=3000.
NUM_MUTATIONS = int(os.environ.get("SAMOE_FUZZ", "120"))
TEXTS = [f"document {n} " + "words and words " * (n % 5) for n in range(40)]
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


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
def test_mutated_inputs(tmp_path: Path, suffix: str) -> None:
    good, random = KINDS[suffix](), np.random.default_rng(7)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {"error": 0, "answer": 0}
    for number in range(NUM_MUTATIONS):
        path = tmp_path / f"in{suffix}"
        path.write_bytes(mutate(good, random) if number else good)
        options = PreprocessOptions(
            (str(path),), str(tmp_path / "out"), executor="inline", quiet=True, chunk_bytes=512, on_bad_input="skip"
        )
        try:
            report = preprocess(options)
        except DataError as error:
            assert len(str(error)) < 2000
            outcomes["error"] += 1
            continue
        outcomes["answer"] += 1
        assert report.totals.num_lines >= report.num_documents
        if number % 10 == 0:
            verify(str(tmp_path / "out_text_document"))
        data = IndexedDataset(str(tmp_path / "out_text_document"))
        assert data.num_documents == report.num_documents
        if number == 0:
            assert [bytes(data.document(i).tolist()).decode() for i in range(len(TEXTS))] == TEXTS
    assert outcomes["answer"] > 0, outcomes
    peak_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert peak_mb < 400, f"{peak_mb} MB for an input of {len(good)} bytes"


#: Reads a file in a process of its own, and says the growth of its memory in MB. Where a trainer ran before, freed memory is kept.
READ_BOMB = """
import resource, sys
from megatron_samoe.datasets.preprocess.options import PreprocessOptions
from megatron_samoe.datasets.preprocess.run import preprocess
from megatron_samoe.errors import DataError
options = PreprocessOptions(
    (sys.argv[1],), sys.argv[2], executor="inline", quiet=True, on_bad_input="skip", max_document_bytes=1 << 20,
)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    preprocess(options)
except DataError as error:
    assert "The corpus is empty" in str(error), error
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_a_decompression_bomb_is_a_long_line_and_no_more(tmp_path: Path, suffix: str) -> None:
    zstandard = pytest.importorskip("zstandard")
    bomb = b'{"text": "' + b"a" * (64 << 20) + b'"}\n'
    path = tmp_path / f"in.jsonl{suffix}"
    path.write_bytes(gzip.compress(bomb, 1) if suffix == ".gz" else zstandard.ZstdCompressor().compress(bomb))
    words = [sys.executable, "-c", READ_BOMB, str(path), str(tmp_path / "out")]
    found = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) < 300, f"{found.stdout} MB"
