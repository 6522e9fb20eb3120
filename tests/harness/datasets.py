"""Indexed datasets that tests make, from ids or by the preprocessor, and what they hold."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_samoe.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron_samoe.datasets.preprocess.options import PreprocessOptions
from megatron_samoe.datasets.preprocess.run import preprocess


def write_dataset(prefix: str | Path, documents: Iterable[Sequence[int] | np.ndarray], dtype: Any = np.uint16) -> str:
    """Writes documents of one sequence each (none for an empty document), and returns the prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for tokens in documents:
        builder.add_document(tokens, [len(tokens)] if len(tokens) else [])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def random_dataset(prefix: Path, lengths: Iterable[int], vocab_size: int = 257, seed: int = 0) -> str:
    """Writes documents of random tokens, and returns the prefix."""
    random = np.random.default_rng(seed)
    return write_dataset(prefix, [random.integers(0, vocab_size, length) for length in lengths])


def content(prefix: str | Path) -> bytes:
    """Returns the bytes of both files of a dataset."""
    return b"".join(Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx"))


def decoded(prefix: str | Path) -> list[str]:
    """Returns the documents of a dataset of bytes, without the tokens that end them."""
    data = IndexedDataset(str(prefix))
    return [bytes(t for t in data.document(i).tolist() if t < 256).decode() for i in range(data.num_documents)]


def jsonl(texts: Iterable[str]) -> bytes:
    """Returns texts as lines of JSON."""
    return "".join(json.dumps({"text": text, "n": number}) + "\n" for number, text in enumerate(texts)).encode()


def options(folder: Path, *names: str, **values: Any) -> PreprocessOptions:
    """Returns options for files of a folder: an inline worker, small chunks, and the output `out` there."""
    defaults = {"output_prefix": str(folder / "out"), "executor": "inline", "chunk_bytes": 256, "quiet": True}
    return PreprocessOptions(tuple(str(folder / name) for name in names), **{**defaults, **values})


def preprocessed(folder: Path, name: str, texts: Iterable[str], **values: Any) -> str:
    """Makes a dataset of texts, which has a manifest, and returns its prefix."""
    (folder / f"{name}.jsonl").write_bytes(jsonl(texts))
    preprocess(options(folder, f"{name}.jsonl", output_prefix=str(folder / name), **values))
    return str(folder / f"{name}_text_document")


def seconds_of(command: Sequence[str]) -> float:
    """Runs a program to its end, and returns how long it took."""
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def kill_9(command: Sequence[str], after_s: float) -> bool:
    """Starts a program, and kills it after some seconds; returns whether it had not ended by then."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            assert process.wait(timeout=after_s) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            return True
    return False
