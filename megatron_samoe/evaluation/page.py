"""A report: one self-contained HTML page of sections, each with words, a table or a plot."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_samoe.evaluation.run_summary import Table

STYLE = """:root{color-scheme:light}body{font:16px/1.55 system-ui,"DejaVu Sans",sans-serif;max-width:1600px;margin:0 auto;
padding:1rem;color:#1c2430;background:#fff}h1{font-size:1.6rem;margin:.6em 0 .2em}h2{font-size:1.2rem;margin:2em 0 .4em;
border-top:1px solid #d5dae1;padding-top:1em}nav{font-size:.9rem;margin:.6em 0 1em}nav a{margin-right:1em;color:#1f5fbf}
div.wide{overflow-x:auto;max-width:100%}div.wide::-webkit-scrollbar{height:10px;background:#eef0f3}
div.wide::-webkit-scrollbar-thumb{background:#9aa4b1;border-radius:5px}table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
td,th{padding:.3em .45em;text-align:right;border-bottom:1px solid #e2e6eb;white-space:nowrap}th{vertical-align:bottom;white-space:normal}
td:first-child,th:first-child{text-align:left}img{max-width:100%;height:auto}p{max-width:75ch}p.how{color:#5b6675;
font-size:.9rem}p.sentence{font-size:1.05rem;max-width:none}div.beside{display:flex;flex-wrap:wrap;gap:1.5rem;
align-items:flex-start}div.beside div.wide{flex:0 1 auto}div.beside div.wide.plot{flex:1 1 380px;min-width:0}
@media(max-width:640px){h1{font-size:1.3rem}div.plot img{max-width:none;width:640px}div.plot.small img{width:100%}}
blockquote{border-left:3px solid #c9ced6;margin-left:0;padding-left:1em;white-space:pre-wrap}"""


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
    for section in sections:
        if section.png is not None:
            (path.parent / f"{section.name}.png").write_bytes(section.png)
    path.write_text(page_text(title, sections, samples), encoding="utf-8")


def page_text(
    title: str, sections: Sequence[Section], samples: Mapping[str, str] | None = None, refresh_s: int | None = None
) -> str:
    """Returns the page; see `write_page`.

    Args:
        refresh_s: seconds after which a browser reads it again.
    """
    shown = [section for section in sections if not section.is_empty]
    links = "".join(f'<a href="#{s.name}">{html.escape(s.heading)}</a> ' for s in shown)
    body = [f"<h1>{html.escape(title)}</h1>", f"<nav>{links}</nav>"]
    for section in shown:
        body += _render(section)
    missing: dict[str, list[str]] = {}
    for section in sections:
        if section.is_empty:
            missing.setdefault(section.without, []).append(section.heading)
    for sentence, headings in missing.items():
        body.append(
            f'<p class="how">Not in this report: {html.escape("; ".join(headings))}. {html.escape(sentence)}</p>'
        )
    for name, text in (samples or {}).items():
        body.append(f"<h2>Sample of {html.escape(name)}</h2><blockquote>{html.escape(text)}</blockquote>")
    refresh = "" if refresh_s is None else f'<meta http-equiv="refresh" content="{refresh_s}">'
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{refresh}<meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title><style>{STYLE}</style></head>'
    )
    return f"{head}<body>{''.join(body)}</body></html>"


def _render(section: Section) -> list[str]:
    body = [f'<h2 id="{section.name}">{html.escape(section.heading)}</h2>']
    if section.sentence:
        body.append(f'<p class="sentence">{html.escape(section.sentence)}</p><div class="beside">')
    if len(section.table) > 1:
        body.append(_table(section.table))
    if section.png is not None:
        encoded = base64.b64encode(section.png).decode()
        kind = "wide plot small" if section.sentence else "wide plot"  # the first plot is read without scrolling
        image = f'<img alt="{html.escape(section.heading)}" src="data:image/png;base64,{encoded}">'
        body.append(f'<div class="{kind}">{image}</div>')
    body += ["</div>"] if section.sentence else []
    return body + [f'<p class="how">{html.escape(text)}</p>' for text in section.paragraphs]


def _table(rows: Table) -> str:
    head, *rest = rows
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rest)
    return f'<div class="wide"><table><tr>{cells}</tr>{lines}</table></div>'
