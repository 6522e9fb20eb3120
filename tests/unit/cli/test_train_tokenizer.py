"""What training a tokenizer says: the entries that it has, and that they are fewer than were asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_samoe.cli.train_tokenizer import main


def train(folder: Path, text: str, kind: str, size: int) -> int:
    (folder / "text.txt").write_text(text)
    words = f"--type {kind} --input {folder}/text.txt --vocab-size {size} --output-prefix {folder}/tok --num-threads 1"
    return main(words.split())


def test_fewer_entries_than_asked_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, "It was a fine day. " * 9, "byte-bpe", 5000) == 0
    said = capsys.readouterr().out
    made = len(json.loads((tmp_path / "tok-vocab.json").read_text()))
    assert 257 < made < 5000 and f"tok.json: {made:,} entries" in said
    assert "note: 5,000 were asked for" in said and "more text gives more" in said


@pytest.mark.parametrize(("kind", "size"), [("byte-bpe", 260), ("sentencepiece-bpe", 300)])
def test_as_many_as_asked_need_no_note(
    kind: str, size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "It was a fine day, and a finer night was to come of it.\n" * 40, kind, size) == 0
    said = capsys.readouterr().out
    assert f": {size} entries" in said and "note" not in said


def test_an_impossible_size_is_refused_by_sentencepiece_with_the_largest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "It was a fine day.\n" * 9, "sentencepiece-bpe", 5000) == 1
    assert "--vocab-size 5000 does not fit the corpus" in capsys.readouterr().err
