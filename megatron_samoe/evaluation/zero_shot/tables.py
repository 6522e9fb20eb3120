"""Results as text for a terminal and as lines of Markdown alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_samoe.evaluation.run_summary import format_table
from megatron_samoe.evaluation.zero_shot.metrics import SHARES_OF_ITEMS
from megatron_samoe.evaluation.zero_shot.results import TaskResult
from megatron_samoe.evaluation.zero_shot.variation import Comparison, Variation


def _shown(value: float, in_percent: bool) -> str:
    if math.isnan(value):
        return "-"
    return f"{100 * value:.2f}" if in_percent else f"{value:,.4g}" if abs(value) < 1e5 else f"{value:.3e}"


def metric_line(result: TaskResult) -> str:
    """Returns all of a task's metrics in one line: some mean little without the others."""
    return ", ".join(f"{name} {_shown(m.value, m.metric.in_percent)}" for name, m in result.metrics.items())


def result_table(results: Sequence[TaskResult]) -> str:
    """Returns every metric of every task with its standard error; shares in percent."""
    rows = [["task", "items", "metric", "value", "std. error", "best constant", "contexts cut"]]
    for result in results:
        # What is said of the task stands in its first row.
        task, items, cut = result.task, f"{result.num_items:,}", f"{result.num_cut:,}"
        for name, measured in result.metrics.items():
            percent = measured.metric.in_percent
            rows.append([
                task,
                items,
                name,
                _shown(measured.value, percent),
                _shown(measured.stderr, percent),
                _shown(result.best_constant, True) if name in SHARES_OF_ITEMS else "",
                cut,
            ])  # fmt: skip
            task = items = cut = ""
    return format_table(rows)


def notes(results: Sequence[TaskResult], seq_length: int | None) -> list[str]:
    """Returns what a reader must know beside the table."""
    cut = ", ".join(f"{r.task} {r.num_cut:,} of {r.num_items:,}" for r in results if r.num_cut)
    windowed = ", ".join(f"{r.task} {r.num_windowed:,}" for r in results if r.num_windowed)
    texts = {
        f"Contexts longer than the model's {seq_length} tokens were cut from the left": cut,
        "Continuations longer than that were scored in windows": windowed,
    }
    return [f"{text}: {tasks}." for text, tasks in texts.items() if tasks]


def variation_table(variations: Sequence[Variation]) -> str:
    """Returns mean, standard deviation and range over checkpoints, beside the standard error of one of them."""
    rows = [["task", "metric", "mean", "sd", "lowest", "highest", "std. error of one"]]
    for v in variations:
        values = (v.spread.mean, v.spread.sd, v.spread.low, v.spread.high, v.stderr)
        rows.append([v.task, v.metric, *(_shown(value, v.in_percent) for value in values)])
    return format_table(rows)


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Returns the paired tests; the difference is the second model's value less the first's."""
    rows = [["task", "metric", "first", "second", "difference", "95 % interval", "p bootstrap", "only first", "only second",
             "p McNemar"]]  # fmt: skip
    for c in comparisons:
        d, m = c.difference, c.mcnemar
        show = [_shown(value, c.in_percent) for value in (c.first, c.second, d.value, d.low, d.high)]
        rows.append([
            c.task, c.metric, *show[:3], f"{show[3]} to {show[4]}", f"{d.p_value:.4f}",
            *((f"{m.only_first:,}", f"{m.only_second:,}", f"{m.p_value:.4f}") if m else ("", "", "")),
        ])  # fmt: skip
    return format_table(rows)
