#!/usr/bin/env python3
"""Cuts text files into documents and holds every 20th out twice: writes train.jsonl, valid.jsonl and test.jsonl.

`prepare_corpus.py --output-dir DIR FILE [FILE ...]`. Documents are whole paragraphs, some 2,000 characters together, in
the order of a shuffle with a fixed seed, so that all files have the style of every input.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

DOCUMENT_CHARS = 2000
HOLD_OUT_EVERY = 20


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


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output-dir", type=Path, required=True)
    options = parser.parse_args()
    missing = [str(path) for path in options.files if not path.is_file()]
    if missing:
        sys.exit(f"error: no such file: {', '.join(missing)}")
    every = [document for path in sorted(options.files) for document in documents(path.read_text(errors="replace"))]
    random.Random(0).shuffle(every)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    held_out = {0: "valid", 1: "test"}
    for name in ("train", "valid", "test"):
        chosen = [d for i, d in enumerate(every) if held_out.get(i % HOLD_OUT_EVERY, "train") == name]
        path = options.output_dir / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in chosen))
        print(f"{path}: {len(chosen):,} documents, {sum(map(len, chosen)):,} characters")


if __name__ == "__main__":
    main()
