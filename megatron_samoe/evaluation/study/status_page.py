"""A page that shows a study while it runs: the state of every run, and the loss curves."""

from __future__ import annotations

import html
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_samoe.evaluation.plots import colour
from megatron_samoe.evaluation.run_summary import read_records
from megatron_samoe.evaluation.study.definition import Run
from megatron_samoe.evaluation.study.programs import pause_file
from megatron_samoe.evaluation.study.runner import StudyRunner
from megatron_samoe.parsing import JsonObject

#: Seconds between two writes, and after which a browser reads the page again.
_EVERY_S = 15.0
_WIDTH, _HEIGHT, _MARGIN = 860, 360, 46
#: Told apart by people who are blind to some colours, too (Okabe and Ito).
_STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem}
table{border-collapse:collapse;width:100%}td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #8884}
td:first-child,th:first-child{text-align:left}.running{font-weight:600}.failed{color:#b3261e}
:root{color-scheme:light dark}svg text{fill:currentColor;font-size:12px}svg{background:#fff;color:#222}"""


@dataclass
class StatusPage:
    """Writes status.html into the folder of a study's runs."""

    _written: float = -math.inf
    _known: dict[Path, tuple[int, list[JsonObject]]] = field(default_factory=dict)

    def write(self, runner: StudyRunner) -> None:
        """Writes the page, if the last is some seconds old or nothing runs any more."""
        if time.monotonic() - self._written < _EVERY_S and runner.active:
            return
        self._written = time.monotonic()
        plan = runner.plan
        runs, title = plan.all_runs(), html.escape(plan.study.title)
        records = {run.directory: self._records(run) for run in runs}
        rows = [self._row(run, runner, records[run.directory]) for run in runs]
        done = sum(plan.is_finished(run) for run in runs)
        state = "paused" if pause_file(plan.root).exists() else f"{len(runner.active)} running here"
        page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="{_EVERY_S:.0f}">
<meta name="viewport" content="width=device-width"><title>{title}</title><style>{_STYLE}</style>
<h1>{title}</h1>
<p>{done} of {len(runs)} runs finished, {state}, {len(plan.failures)} failed; {time.strftime("%Y-%m-%d %H:%M:%S")}.</p>
{_curves(runs, records)}
<table><tr><th>run<th>state<th>step<th>training loss<th>validation<th>tokens/s</tr>
{"".join(rows)}</table></html>
"""
        half = plan.root / f"status.{os.getpid()}.tmp"
        half.write_text(page, encoding="utf-8")
        half.replace(plan.root / "status.html")

    def _records(self, run: Run) -> list[JsonObject]:
        """Returns the records of a run, read again only where its file has grown."""
        path = run.directory / "metrics.jsonl"
        size = path.stat().st_size if path.is_file() else 0
        if self._known.get(run.directory, (0, []))[0] != size:
            self._known[run.directory] = size, read_records(path)
        return self._known.get(run.directory, (0, []))[1]

    def _row(self, run: Run, runner: StudyRunner, records: Sequence[JsonObject]) -> str:
        if run.directory in runner.plan.failures:
            state = "failed"
        elif runner.plan.is_finished(run):
            state = "finished"
        elif run.directory in runner.active:
            state = "running"
        else:
            state = "waiting" if runner.plan.is_settled(run) else "waiting for its sweep"
        last = {key: next((r[key] for r in reversed(records) if key in r), None)
                for key in ("iteration", "lm_loss", "validation_loss", "tokens_per_s")}  # fmt: skip
        cells = [run.label, state, _shown(last["iteration"], ","), _shown(last["lm_loss"], ".4f"),
                 _shown(last["validation_loss"], ".4f"), _shown(last["tokens_per_s"], ",.0f")]  # fmt: skip
        return f'<tr class="{state.split()[0]}">' + "".join(f"<td>{html.escape(cell)}" for cell in cells) + "</tr>\n"


def _shown(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _curves(runs: Sequence[Run], records: dict[Path, list[JsonObject]]) -> str:
    """Returns the validation losses over steps as an SVG, a colour for each variant; nothing before the first."""
    curves = [
        (run, [(r["iteration"], r["validation_loss"]) for r in records[run.directory]
               if math.isfinite(r.get("validation_loss", math.nan))])
        for run in runs if run.swept is None
    ]  # fmt: skip
    points = [point for _, curve in curves for point in curve]
    if not points:
        return ""
    most = max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    names = list(dict.fromkeys(run.variant.name for run, curve in curves if curve))

    def place(x: float, y: float) -> str:
        across = _MARGIN + (_WIDTH - 2 * _MARGIN) * x / max(most, 1)
        down = _MARGIN + (_HEIGHT - 2 * _MARGIN) * (high - y) / max(high - low, 1e-9)
        return f"{across:.1f},{down:.1f}"

    lines = "".join(
        f'<polyline fill="none" stroke-width="1.5" stroke="{colour(names.index(run.variant.name))}" '
        f'points="{" ".join(place(*p) for p in curve)}"/>'
        for run, curve in curves if curve
    )  # fmt: skip
    legend = "".join(
        f'<text x="{_WIDTH - 230}" y="{_MARGIN + 16 * i}" style="fill:{colour(i)}">{html.escape(n)}</text>'
        for i, n in enumerate(names)
    )
    axis = (
        f'<text x="4" y="{_MARGIN}">{high:.3f}</text><text x="4" y="{_HEIGHT - _MARGIN}">{low:.3f}</text>'
        f'<text x="{_WIDTH - _MARGIN - 60}" y="{_HEIGHT - 12}">{most:,} steps</text>'
        f'<text x="{_MARGIN}" y="{_HEIGHT - 12}">validation loss, nats per token</text>'
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="validation losses">{lines}{legend}{axis}</svg>'
    )
