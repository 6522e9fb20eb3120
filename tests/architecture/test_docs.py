"""README and docs are short enough to be read; tables and drawings are what their programs make."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megatron_samoe.evaluation.run_groups import summary_table
from tests.distributed.test_layout_parity import RTOL
from tests.harness.layout_training import LAYOUTS, MODELS
from tests.harness.pairs import first_by_day
from tools.pages import draw_idea, hardware_table

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_it_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120
    prose = [block for block in README.split("\n\n") if not block.startswith(("    ", "|", "<", "#"))]
    for paragraph in re.split(r"\n\n|\n(?=- )", "\n\n".join(prose)):
        assert paragraph.count("\n") < 4, paragraph


def test_its_table_has_the_columns_of_the_quickstart() -> None:
    (row,) = re.findall(r"^\|(model.*)\|$", README, re.MULTILINE)
    assert row.split("|") == summary_table([])[0]


def test_what_is_exact_is_what_is_tested() -> None:
    """Of the night's table; `IN_DOUBLE` and `AT_NIGHT` take each of its cells."""
    single, double = (f"{RTOL[dtype]:g}".replace("e-0", "e-") for dtype in (torch.float32, torch.float64))
    ranks = max(count for count, _ in LAYOUTS.values())
    for said in (
        f"agree to a relative {single} in fp32 and {double} in fp64",
        f"trains {len(MODELS)} models in all of {len(LAYOUTS) - 1} layouts (up to {ranks} ranks)",
    ):
        assert said in " ".join(README.split())


@pytest.mark.parametrize("name", draw_idea.PICTURES)
def test_the_drawing_is_what_its_script_draws(name: str) -> None:
    assert (draw_idea.IMAGES / name).read_text() == draw_idea.drawing(*draw_idea.PICTURES[name])
    assert name in README
    assert name == "idea.svg" or f'content: url("{name}")' in (ROOT / "docs/static/site.css").read_text()


@pytest.mark.parametrize("size", first_by_day([*hardware_table.SIZES, *hardware_table.PUBLISHED]))
def test_the_table_of_what_runs_need_is_the_planners(size: str) -> None:
    page = (ROOT / "docs/hardware.md").read_text()
    assert all(f"{line}\n" in page for line in hardware_table.table([size]))


#: Words of all pages: what has a letter, since a table of figures is looked at, not read. Not counted are comments, which nobody
#: is shown, and the generated reference, which comes from docstrings.
MOST_WORDS = 25_000


def test_the_docs_hold_no_more_words_than_someone_reads() -> None:
    pages = [
        page
        for page in (ROOT / "docs").rglob("*.md")
        if not {"reference", "_build"} & set(page.relative_to(ROOT / "docs").parts)
    ]
    shown = {page: re.sub("<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL) for page in pages}
    words = {
        str(page.relative_to(ROOT / "docs")): len(re.findall(r"\S*[^\W\d_]\S*", text)) for page, text in shown.items()
    }
    longest = sorted(words.items(), key=lambda entry: -entry[1])[:5]
    assert "results/README.md" in words and len(words) > 25
    assert sum(words.values()) <= MOST_WORDS, f"docs have {sum(words.values())} words; the longest pages are {longest}"
