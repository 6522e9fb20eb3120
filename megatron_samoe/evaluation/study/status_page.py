"""A page that shows a study while it runs: the state of every run, and the loss curves."""

from __future__ import annotations

import html
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from megatron_samoe.evaluation.plots import colour
from megatron_samoe.evaluation.run_summary import read_records
from megatron_samoe.evaluation.study.definition import Run
from megatron_samoe.evaluation.study.programs import pause_file
from megatron_samoe.evaluation.study.runner import StudyRunner
from megatron_samoe.parsing import JsonObject

#: Seconds between two writes, and after which a browser reads the page again.
_EVERY_S = 15.0
_WIDTH, _HEIGHT = 860, 380
#: The chart's own edges; the names of models are right of it.
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 640, 16, 326
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
    found = [
        (run.variant.name, [(r["iteration"], r["validation_loss"]) for r in records[run.directory]
                            if math.isfinite(r.get("validation_loss", math.nan))])
        for run in runs if run.swept is None
    ]  # fmt: skip
    curves = [(name, curve) for name, curve in found if curve]
    if not curves:
        return ""
    points = [point for _, curve in curves for point in curve]
    plane = _Plane(max(x for x, _ in points), min(y for _, y in points), max(y for _, y in points))
    names = list(dict.fromkeys(name for name, _ in curves))
    parts = [plane.axes("step", "validation loss (nats per token)")]
    for name, curve in curves:
        places = [plane.place(*point) for point in curve]
        stroke = colour(names.index(name))
        # A dot is to be seen before there is a line.
        parts += [f'<circle r="2.2" fill="{stroke}" cx="{x:.1f}" cy="{y:.1f}"/>' for x, y in places]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline fill="none" stroke-width="1.5" stroke="{stroke}" points="{line}"/>')
    parts += [
        f'<text x="{_RIGHT + 14}" y="{_TOP + 10 + 18 * i}" style="fill:{colour(i)}">{html.escape(name)}</text>'
        for i, name in enumerate(names)
    ]
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="validation losses">{"".join(parts)}</svg>'


class _Plane:
    """Where values lie in a chart: steps from 0 across, losses upwards, both to the next tick."""

    def __init__(self, most: float, low: float, high: float):
        self._steps = MaxNLocator(6, steps=(1, 2, 5, 10), integer=True).tick_values(0, max(most, 1))
        self._losses = MaxNLocator(6, steps=(1, 2, 5, 10)).tick_values(low, high if high > low else low + 1e-3)

    def place(self, step: float, loss: float) -> tuple[float, float]:
        """Returns the place of a point."""
        (left, *_, right), (low, *_, high) = self._steps, self._losses
        across = _LEFT + (_RIGHT - _LEFT) * (step - left) / (right - left)
        return across, _BOTTOM - (_BOTTOM - _TOP) * (loss - low) / (high - low)

    def axes(self, across: str, upwards: str) -> str:
        """Returns lines and figures at the ticks, and what they count."""
        parts = []
        decimals = max(0, -math.floor(math.log10(self._losses[1] - self._losses[0]) + 1e-9))
        for loss in self._losses:
            _, y = self.place(0, loss)
            parts.append(f'<path d="M{_LEFT} {y:.1f}H{_RIGHT}" stroke="#8885"/>')
            parts.append(
                f'<text x="{_LEFT - 8}" y="{y:.1f}" dominant-baseline="middle" text-anchor="end">{loss:.{decimals}f}</text>'
            )
        for step in self._steps:
            x, _ = self.place(step, 0)
            parts.append(f'<path d="M{x:.1f} {_TOP}V{_BOTTOM + 5}" stroke="#8885"/>')
            parts.append(f'<text x="{x:.1f}" y="{_BOTTOM + 20}" text-anchor="middle">{step:,.0f}</text>')
        parts.append(f'<path d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}" fill="none" stroke="currentColor"/>')
        parts.append(f'<text x="{(_LEFT + _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{across}</text>')
        middle = (_TOP + _BOTTOM) / 2
        parts.append(
            f'<text transform="rotate(-90 14 {middle})" x="14" y="{middle}" text-anchor="middle">{upwards}</text>'
        )
        return "".join(parts)
