#!/usr/bin/env python3
"""Cuts text files into documents and holds every 50th out: writes train.jsonl and valid.jsonl.

`prepare_corpus.py --output-dir DIR FILE [FILE ...]`. Documents are whole paragraphs, about 2,000 characters together, in
the order of a shuffle with a fixed seed, so that both files have the style of every input.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

DOCUMENT_CHARS = 2000
HOLD_OUT_EVERY = 50


def documents(text: str) -> Iterator[str]:
    """Yields runs of paragraphs that together reach DOCUMENT_CHARS."""
    gathered: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        gathered.append(paragraph.strip())
        if sum(map(len, gathered)) >= DOCUMENT_CHARS:
            yield "\n\n".join(gathered)
            gathered = []
    if any(gathered):
        yield "\n\n".join(gathered)


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
    for name, held_out in (("train", False), ("valid", True)):
        chosen = [d for i, d in enumerate(every) if (i % HOLD_OUT_EVERY == 0) == held_out]
        path = options.output_dir / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in chosen))
        print(f"{path}: {len(chosen):,} documents, {sum(map(len, chosen)):,} characters")


if __name__ == "__main__":
    main()
