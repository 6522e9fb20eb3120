"""A study's data from a folder of text."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_samoe.errors import DataError
from megatron_samoe.evaluation.study import text_folder


def test_programs_that_begin_at_once_make_the_data_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/novel.txt").write_text("\n\n".join(f"Paragraph {n}. " + "word " * 100 for n in range(200)))
    steps: list[str] = []

    def step(*words: str) -> None:  # which would train a tokenizer
        steps.append(words[0])
        time.sleep(0.1)

    monkeypatch.setattr(text_folder, "_step", step)
    said: list[str] = []
    with ThreadPoolExecutor(3) as programs:
        begun = [
            programs.submit(text_folder.prepare, tmp_path / "texts", tmp_path / "out", 500, said.append)
            for _ in range(3)
        ]
    flags = [one.result() for one in begun]
    assert steps == ["train-tokenizer", "preprocess", "preprocess", "preprocess"] and len(said) == 1
    assert flags[0] == flags[1] == flags[2] and str(tmp_path / "out/valid_text_document") in flags[0]
    parts = [(tmp_path / f"out/{part}.jsonl").read_text().splitlines() for part in ("train", "valid", "test")]
    assert min(map(len, parts)) >= 2 and len(set(parts[0]) | set(parts[1]) | set(parts[2])) == sum(map(len, parts))


def test_too_little_text_is_refused_with_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("Short.")
    with pytest.raises(DataError, match=r"has 1 files ending in \.txt, \.md, \.text with 1 documents"):
        text_folder.prepare(tmp_path, tmp_path / "out", 500, print)
