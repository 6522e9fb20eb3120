"""The words of the package: odd ones may become fewer, not more."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

WORDS = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text())
PACKAGE = Path(__file__).resolve().parents[2] / "megatron_samoe"
TEXT = "\n".join(path.read_text() for path in sorted(PACKAGE.rglob("*.py")))


@pytest.mark.parametrize("word", WORDS)
def test_an_odd_word_becomes_no_more_frequent(word: str) -> None:
    *better, most = WORDS[word]
    found = len(re.findall(word, TEXT, re.IGNORECASE))
    assert found <= most, f"{found} times, {most} are allowed; write: {', '.join(better)}"
