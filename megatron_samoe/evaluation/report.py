"""One self-contained HTML page about a set of runs."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_samoe.evaluation import plots
from megatron_samoe.evaluation.run_summary import RunSummary, summary_table

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.3em .8em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}img{max-width:100%}blockquote{border-left:3px solid #ccc;margin-left:0;
padding-left:1em;white-space:pre-wrap}"""


def write_report(
    path: Path,
    title: str,
    runs: Sequence[RunSummary],
    notes: Sequence[str] = (),
    samples: Mapping[str, str] | None = None,
) -> None:
    """Writes the page, and each plot as a PNG beside it.

    Args:
        notes: paragraphs under the table.
        samples: text per model.
    """
    figures = {
        "loss_curves": ("Loss curves", plots.loss_curves(runs)),
        "expert_load": ("Expert load per layer", plots.expert_load(runs)),
        "combinations": ("Combination coefficients", plots.combinations(runs)),
        "gradient_norms": ("Gradient norm per expert and layer", plots.gradient_norms(runs)),
    }
    body = [f"<h1>{html.escape(title)}</h1>", _table(summary_table(list(runs)))]
    body += [f"<p>{html.escape(note)}</p>" for note in notes]
    for name, (heading, png) in figures.items():
        if png is None:
            continue
        (path.parent / f"{name}.png").write_bytes(png)
        encoded = base64.b64encode(png).decode()
        body.append(
            f'<h2>{html.escape(heading)}</h2><img alt="{html.escape(heading)}" src="data:image/png;base64,{encoded}">'
        )
    for name, text in (samples or {}).items():
        body.append(f"<h2>Sample of {html.escape(name)}</h2><blockquote>{html.escape(text)}</blockquote>")
    page = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    path.write_text(f"{page}<style>{STYLE}</style></head><body>{''.join(body)}</body></html>")


def _table(rows: list[list[str]]) -> str:
    head, *rest = rows
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rest)
    return f"<table><tr>{cells}</tr>{lines}</table>"
