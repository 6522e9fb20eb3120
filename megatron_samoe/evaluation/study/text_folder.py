"""A study's corpus from a folder of text: documents with some held out, a tokenizer, and indexed datasets."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_samoe import children
from megatron_samoe.dist_checkpointing.folder_lock import folder_lock
from megatron_samoe.errors import DataError

#: Characters after which a document ends, at the next empty line or, in a text without, at twice that number.
DOCUMENT_CHARS = 2000
#: Every 20th document is for validation, and the one after it for a test.
HOLD_OUT_EVERY = 20
PARTS = {0: "valid", 1: "test"}
_SUFFIXES = (".txt", ".md", ".text")


def documents(text: str) -> Iterator[str]:
    """Yields runs of lines that together reach DOCUMENT_CHARS, cut between paragraphs or, in a text without, anywhere."""
    gathered: list[str] = []
    size = 0
    for line in text.splitlines():
        if (size >= DOCUMENT_CHARS and not line.strip()) or size >= 2 * DOCUMENT_CHARS:
            yield "\n".join(gathered).strip()
            gathered, size = [], 0
        gathered.append(line)
        size += len(line)
    if any(line.strip() for line in gathered):
        yield "\n".join(gathered).strip()


def split_documents(folder: Path, output: Path) -> dict[str, int]:
    """Writes train.jsonl, valid.jsonl and test.jsonl from the text files in a folder and below, in an order shuffled with a fixed
    seed, so that all three have the style of every file. Returns the number of documents of each.

    Raises:
        DataError: there is too little text to hold any out.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    every = [document for path in files for document in documents(path.read_text(encoding="utf-8", errors="replace"))]
    if len(every) < HOLD_OUT_EVERY:
        raise DataError(
            f"{folder} has {len(files)} files ending in {', '.join(_SUFFIXES)} with {len(every)} documents of some "
            f"{DOCUMENT_CHARS} characters; a study needs {HOLD_OUT_EVERY} at the very least."
        )
    random.Random(0).shuffle(every)
    output.mkdir(parents=True, exist_ok=True)
    counts = {}
    for part in ("train", "valid", "test"):
        chosen = [d for i, d in enumerate(every) if PARTS.get(i % HOLD_OUT_EVERY, "train") == part]
        lines = [json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in chosen]
        (output / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts[part] = len(chosen)
    return counts


def prepare(folder: Path, output: Path, vocab_size: int, say: Callable[[str], None]) -> list[str]:
    """Makes tokenizer and datasets of a folder of text, if they are not there yet, and returns the flags of pretraining that
    name them.

    Args:
        vocab_size: of the byte-level BPE.

    Raises:
        DataError: the text cannot be read, is too short, or a step failed.
    """
    if not folder.is_dir():
        raise DataError(f"--text {folder} is not a folder.")
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(output / "tokenizer.json")]
    for part in ("train", "valid"):  # the test set is for whoever evaluates the study's end, not for every run
        flags += [f"--{part}-data-path", str(output / f"{part}_text_document")]
    ready = output / "ready"
    if not ready.is_file():
        output.mkdir(parents=True, exist_ok=True)
        with folder_lock(output, patience_s=3600):  # of programs that share a study one makes the data, the others wait
            if not ready.is_file():
                _make(folder, output, flags[:4], vocab_size, say)
                ready.touch()  # last: it says that all of it is there
    return flags


def _make(folder: Path, output: Path, tokenizer: list[str], vocab_size: int, say: Callable[[str], None]) -> None:
    counts = split_documents(folder, output)
    say(
        f"{folder}: {counts['train']:,} documents to train on, {counts['valid']:,} for validation, {counts['test']:,} for a test"
    )
    words = ["--type", "byte-bpe", "--input", str(output / "train.jsonl"), "--vocab-size", str(vocab_size)]
    _step("train-tokenizer", *words, "--output-prefix", str(output / "tokenizer"), "--overwrite")
    for part in counts:
        words = ["--input", str(output / f"{part}.jsonl"), *tokenizer, "--append-eod"]
        _step("preprocess", *words, "--output-prefix", str(output / part), "--overwrite")


def _step(*words: str) -> None:
    done = children.run([sys.executable, "-m", "megatron_samoe", *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise DataError(f"megatron-samoe {words[0]} ended with status {done.returncode}:\n{done.stderr.strip()}")
