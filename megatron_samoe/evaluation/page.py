"""A report: one self-contained HTML page of sections, each with words, a table or a plot."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import jinja2

from megatron_samoe.evaluation.run_summary import Table
from megatron_samoe.parsing import read_text


@dataclass
class Section:
    """A heading, a sentence that says it all, paragraphs on how to read what follows, a table, and a plot by the name of its
    file, next to the table, where there is a sentence."""

    name: str
    heading: str
    paragraphs: list[str] = field(default_factory=list)
    table: Table = field(default_factory=list)
    png: bytes | None = None
    sentence: str = ""
    #: A sentence for where there is nothing to show: what would have measured it.
    without: str = "Nothing was measured."

    @property
    def is_empty(self) -> bool:
        """Whether there is neither a table nor a plot."""
        return self.png is None and len(self.table) < 2


def write_page(path: Path, title: str, sections: Sequence[Section], samples: Mapping[str, str] | None = None) -> None:
    """Writes the page, and each plot as a PNG next to it; it names sections that have nothing to show.

    Args:
        samples: text per model, at the end.
    """
    missing: dict[str, list[str]] = {}
    for section in sections:
        if section.is_empty:
            missing.setdefault(section.without, []).append(section.heading)
        elif section.png is not None:
            (path.parent / f"{section.name}.png").write_bytes(section.png)
    shown = [section for section in sections if not section.is_empty]
    page = _template().render(title=title, shown=shown, missing=missing, samples=samples or {})
    path.write_text(page, encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    return environment.from_string(read_text(Path(__file__).with_name("page.html")))
