"""Results as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from megatron_samoe.evaluation.run_summary import Table, format_table, table
from megatron_samoe.evaluation.zero_shot.metrics import SHARES_OF_ITEMS
from megatron_samoe.evaluation.zero_shot.results import TaskResult
from megatron_samoe.evaluation.zero_shot.variation import Comparison, Variation


def _shown(value: float, in_percent: bool) -> str:
    if math.isnan(value):
        return ""
    return f"{100 * value:.2f}" if in_percent else f"{value:,.4g}" if abs(value) < 1e5 else f"{value:.3e}"


def _filled(rows: Table) -> str:
    """Returns a table as text without the columns in which no row has anything."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    return format_table([list(row) for row in zip(*columns, strict=True)])


def metric_line(result: TaskResult) -> str:
    """Returns all of a task's metrics in one line: some mean little without the others."""
    return ", ".join(f"{name} {_shown(m.value, m.in_percent)}" for name, m in result.metrics.items())


def result_table(results: Sequence[TaskResult]) -> str:
    """Returns every metric of every task with its standard error; shares in percent. Notes on a task are shown once."""
    rows = [["task", "items", "metric", "value", "std. error", "best constant", "contexts cut"]]
    for result in results:
        task = [result.task, f"{result.num_items:,}", f"{result.num_cut:,}" if result.num_cut else ""]
        for name, m in result.metrics.items():
            constant = _shown(result.best_constant, True) if name in SHARES_OF_ITEMS else ""
            rows.append([*task[:2], name, *(_shown(x, m.in_percent) for x in (m.value, m.stderr)), constant, task[2]])
            task = ["", "", ""]
    return _filled(rows)


def notes(results: Sequence[TaskResult], seq_length: int | None) -> list[str]:
    """Returns the notes on the table."""
    cut = ", ".join(f"{r.task} {r.num_cut:,} of {r.num_items:,}" for r in results if r.num_cut)
    windowed = ", ".join(f"{r.task} {r.num_windowed:,}" for r in results if r.num_windowed)
    texts = {
        f"Contexts longer than the model's {seq_length} tokens were cut from the left": cut,
        "Continuations longer than that were scored in windows": windowed,
    }
    return [f"{text}: {tasks}." for text, tasks in texts.items() if tasks]


def variation_table(variations: Sequence[Variation]) -> str:
    """Returns mean, standard deviation and range over checkpoints, and the standard error of one of them."""
    return _filled(table(_VARIATIONS, variations))


_VARIATIONS: dict[str, Callable[[Variation], str]] = {
    "task": lambda v: v.task,
    "metric": lambda v: v.metric,
    "mean": lambda v: _shown(v.mean, v.in_percent),
    "sd": lambda v: _shown(v.sd, v.in_percent),
    "lowest": lambda v: _shown(v.low, v.in_percent),
    "highest": lambda v: _shown(v.high, v.in_percent),
    "std. error of one": lambda v: _shown(v.stderr, v.in_percent),
}


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Returns the paired tests; the difference is the second model's value less the first's."""
    return _filled(table(_COMPARISONS, comparisons))


def _interval(c: Comparison) -> str:
    return f"{_shown(c.difference.low, c.in_percent)} to {_shown(c.difference.high, c.in_percent)}"


_COMPARISONS: dict[str, Callable[[Comparison], str]] = {
    "task": lambda c: c.task,
    "metric": lambda c: c.metric,
    "first": lambda c: _shown(c.first, c.in_percent),
    "second": lambda c: _shown(c.second, c.in_percent),
    "difference": lambda c: _shown(c.difference.value, c.in_percent),
    "95 % interval": _interval,
    "p bootstrap": lambda c: f"{c.difference.p_value:.4f}",
    "only first": lambda c: f"{c.mcnemar.only_first:,}" if c.mcnemar else "",
    "only second": lambda c: f"{c.mcnemar.only_second:,}" if c.mcnemar else "",
    "p McNemar": lambda c: f"{c.mcnemar.p_value:.4f}" if c.mcnemar else "",
}
