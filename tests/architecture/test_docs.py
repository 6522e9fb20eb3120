"""The docs stay short enough to be read: a page that grows takes its words from another."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
#: Words of all pages: what has a letter, since a table of figures is looked at, not read. Not counted are comments, which nobody
#: is shown, and the generated reference, which comes from docstrings.
MOST_WORDS = 25_000


def test_the_docs_hold_no_more_words_than_someone_reads() -> None:
    pages = [page for page in DOCS.rglob("*.md") if not {"reference", "_build"} & set(page.relative_to(DOCS).parts)]
    shown = {page: re.sub("<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL) for page in pages}
    words = {str(page.relative_to(DOCS)): len(re.findall(r"\S*[^\W\d_]\S*", text)) for page, text in shown.items()}
    longest = sorted(words.items(), key=lambda entry: -entry[1])[:5]
    assert "results/README.md" in words and len(words) > 25
    assert sum(words.values()) <= MOST_WORDS, f"docs have {sum(words.values())} words; the longest pages are {longest}"
