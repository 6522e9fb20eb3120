"""A page that shows a study while it runs: the state of every run, and the loss curves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_samoe.evaluation.page import Section, page_text
from megatron_samoe.evaluation.plots import colour, finished, plt
from megatron_samoe.evaluation.run_summary import read_records, table
from megatron_samoe.evaluation.study.definition import Run
from megatron_samoe.evaluation.study.runner import StudyRunner
from megatron_samoe.parsing import JsonObject, write_atomically

#: Seconds between two writes, and after which a browser reads the page again.
_EVERY_S = 15
#: Columns of the newest record of each kind: heading, key and form.
_NEWEST = (
    ("step", "iteration", ","),
    ("training loss", "lm_loss", ".4f"),
    ("validation", "validation_loss", ".4f"),
    ("tokens/s", "tokens_per_s", ",.0f"),
)


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
        runs = plan.all_runs()
        records = {run.directory: self._records(run) for run in runs}
        newest = {heading: _newest(records, key, form) for heading, key, form in _NEWEST}
        columns: dict[str, Callable[[Run], str]] = {
            "run": lambda run: run.label,
            "state": lambda run: _state(run, runner),
            **newest,
        }
        done = sum(plan.is_finished(run) for run in runs)
        said = (
            f"{done} of {len(runs)} runs finished, {len(runner.active)} running here, {len(plan.failures)} failed; "
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}."
        )
        sections = [
            Section("curves", "Validation loss", png=_curves(runs, records), without="No run was evaluated yet."),
            Section("runs", "Runs", [said], table(columns, runs)),
        ]
        write_atomically(plan.root / "status.html", page_text(plan.study.title, sections, refresh_s=_EVERY_S))

    def _records(self, run: Run) -> list[JsonObject]:
        """Returns the records of a run, read again only where its file has grown."""
        path = run.directory / "metrics.jsonl"
        size = path.stat().st_size if path.is_file() else 0
        if self._known.get(run.directory, (0, []))[0] != size:
            self._known[run.directory] = size, read_records(path)
        return self._known.get(run.directory, (0, []))[1]


def _state(run: Run, runner: StudyRunner) -> str:
    states = {
        "failed": run.directory in runner.plan.failures,
        "finished": runner.plan.is_finished(run),
        "running": run.directory in runner.active,
        "waiting": runner.plan.is_settled(run),
    }
    return next((state for state, holds in states.items() if holds), "waiting for its sweep")


def _newest(records: Mapping[Path, Sequence[JsonObject]], key: str, form: str) -> Callable[[Run], str]:
    """Returns a column of the newest value of a metric."""

    def show(run: Run) -> str:
        return next((format(record[key], form) for record in reversed(records[run.directory]) if key in record), "-")

    return show


def _curves(runs: Sequence[Run], records: Mapping[Path, Sequence[JsonObject]]) -> bytes | None:
    """Returns the validation losses over steps as PNG, a colour for each variant; None before the first."""
    figure, axes = plt.subplots(figsize=(8.5, 4), layout="constrained")
    names = list(dict.fromkeys(run.variant.name for run in runs))
    for run in (run for run in runs if run.swept is None):
        curve = [(r["iteration"], r["validation_loss"]) for r in records[run.directory] if "validation_loss" in r]
        if curve:
            place = names.index(run.variant.name)
            label = None if run.variant.name in axes.get_legend_handles_labels()[1] else run.variant.name
            axes.plot(*zip(*curve, strict=True), ".-", color=colour(place), linewidth=1.2, label=label)
    axes.set(xlabel="step", ylabel="validation loss (nats per token)")
    return finished(figure, axes, bool(axes.lines))
