"""The tables of a report, each a list of columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_samoe.evaluation.measurements import ZeroShot, of_group
from megatron_samoe.evaluation.run_groups import COLUMNS, Column, Groups, RunGroup, columns, mean_sd
from megatron_samoe.evaluation.run_summary import RunSummary, Table, is_noise, millions_text, table


def results_table(groups: Groups) -> Table:
    """Returns parameters, checkpoint sizes and validation losses."""
    return table({name: show for name, show in COLUMNS.items() if name != "tokens/s"}, groups)


def glance_table(groups: Groups) -> Table:
    """Returns the report's first table: loss and size of every model, the best first."""
    ranked = sorted(groups, key=lambda group: group.loss.mean)
    behind: dict[str, Column] = {"from the best": lambda group: f"+{group.loss.mean - ranked[0].loss.mean:.4f}"}
    return table(columns("model", "valid. loss") | behind | columns("parameters", "active"), ranked)


def glance_text(groups: Groups, margin: float) -> str:
    """Returns the best model, and the smallest that is as good within a margin of nats."""
    best = min(groups, key=lambda group: group.loss.mean)
    near = [group for group in groups if group.loss.mean - best.loss.mean <= margin]
    small = min(near, key=lambda group: group.first.parameters.total)
    behind = small.loss.mean - best.loss.mean
    sizes = {group.name: millions_text(group.first.parameters.total) for group in (best, small)}
    larger = ", ".join(group.name for group in near if group is not best)
    also = (
        f"No smaller model comes within {margin} of it{f'; larger ones do: {larger}' if larger else ''}."
        if small is best
        else f"The smallest within {margin} of it: {small.name}, +{behind:.4f} with {sizes[small.name]}."
    )
    if len(groups) == 1:
        return f"{best.name}: {best.loss.text(4)} nats per token with {sizes[best.name]} parameters."
    return f"Best: {best.name}, {best.loss.text(4)} nats per token with {sizes[best.name]} parameters. {also}"


def cost_table(groups: Groups, axes: Mapping[str, Mapping[str, float]]) -> Table:
    """Returns every cost of every model, and its loss."""
    costs = {cost: _cost(values) for cost, values in axes.items()}
    return table({**columns("model"), **costs, **columns("valid. loss")}, groups)


def _cost(values: Mapping[str, float]) -> Column:
    return lambda group: _figure(values.get(group.name))


def _figure(value: float | None) -> str:
    """Returns three digits, or all before the point where there are more; a dash for what is not known."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def speed_table(groups: Groups) -> Table:
    """Returns tokens per second, and where and how they were trained; nothing where a run did not have its machine to itself."""
    trained = [group for group in groups if group.speeds]
    return [] if any(is_noise(group.speeds) for group in trained) else table(_SPEED, trained)


def _described(group: RunGroup) -> RunSummary:
    """Returns the first run whose machine is known; the first if none is."""
    return next((run for run in group.runs if run.machine), group.first)


def _quartiles(group: RunGroup) -> str:
    low, high = np.quantile(group.speeds, (0.25, 0.75))
    return f"{low:,.0f} to {high:,.0f}"


def _device(group: RunGroup) -> str:
    names = {f"{run.machine['device_name']}, {run.machine['device']}" for run in group.runs if run.machine}
    if not names:
        return "GPU, name not recorded" if any("mfu" in r for r in group.first.trained) else "not recorded"
    return "; ".join(sorted(names))


def _ranks(group: RunGroup) -> str:
    machine = _described(group).machine
    return f"{machine['ranks']} x {machine['threads_per_rank']}" if machine else "not recorded"


def _layout(group: RunGroup) -> str:
    machine = _described(group).machine
    if not machine:
        return "not recorded"
    sizes = [f"{name.replace('_', '-')} {size}" for name, size in machine["layout"].items() if size > 1]
    return ", ".join(sizes) or "one rank"


def _batch(group: RunGroup) -> str:
    config = group.first.config
    return f"{config.training.global_batch_size or config.training.micro_batch_size} x {config.model.seq_length}"


_SPEED: dict[str, Column] = {
    "model": lambda group: group.name,
    "tokens/s": lambda group: f"{np.median(group.speeds):,.0f}",
    "quartiles": _quartiles,
    "intervals": lambda group: str(len(group.speeds)),
    "device": _device,
    "ranks x threads": _ranks,
    "layout": _layout,
    "batch x sequence": _batch,
    "steps": lambda group: str(group.first.trained[-1]["iteration"]),
}


@dataclass(frozen=True)
class _Measured:
    """One metric of one task for one model: its results, one per seed.

    Attributes:
        task: empty below the first row of a task.
    """

    task: str
    metric: str
    model: str
    results: Sequence[ZeroShot]

    @property
    def first(self) -> ZeroShot:
        """The first seed's."""
        return self.results[0]

    @property
    def newest(self) -> list[float]:
        """The value of each seed that has one."""
        return [r.value for r in self.results if r.value is not None]

    @property
    def varies(self) -> bool:
        """Whether several checkpoints were measured."""
        return bool(self.newest) and len(self.first.values) > 1

    @property
    def values(self) -> list[list[float]]:
        """The values over checkpoints, of each seed."""
        return [[v for v in r.values if v is not None] for r in self.results]


def zero_shot_table(groups: Groups, results: Sequence[ZeroShot]) -> Table:
    """Returns every metric of every model, task by task, with its variation over checkpoints and over seeds."""
    of = {group.name: of_group(group, results) for group in groups}
    rows: list[_Measured] = []
    previous = ""
    for task, metric in dict.fromkeys((r.task, r.metric) for r in results):
        for name, found in of.items():
            mine = [r for r in found if (r.task, r.metric) == (task, metric)]
            if mine:
                rows.append(_Measured(task if task != previous else "", metric, name, mine))
                previous = task
    return table(_ZERO_SHOT, rows)


def _items(row: _Measured) -> str:
    counts = [r.items for r in row.results]
    return " to ".join(dict.fromkeys((str(min(counts)), str(max(counts)))))


def _value(row: _Measured) -> str:
    if not row.newest:
        return "-"
    if len(row.results) > 1:
        return mean_sd(row.newest).text(2)
    return f"{row.newest[0]:.2f}" + ("" if row.first.stderr is None else f" ± {row.first.stderr:.2f}")


def _over_checkpoints(show: Callable[[_Measured, list[float]], str]) -> Callable[[_Measured], str]:
    """Returns a column of what is known where several checkpoints were measured; it is given all of their values."""
    return lambda row: show(row, [v for values in row.values for v in values]) if row.varies else "-"


_ZERO_SHOT: dict[str, Callable[[_Measured], str]] = {
    "task": lambda row: row.task,
    "metric": lambda row: row.metric,
    "model": lambda row: row.model,
    "items": _items,
    "value": _value,
    "over checkpoints": _over_checkpoints(lambda row, values: f"{len(row.first.values)}: {np.mean(values):.2f}"),
    # Over checkpoints of one seed; with several seeds, the mean of their deviations.
    "sd": _over_checkpoints(lambda row, _: f"{np.mean([mean_sd(values).sd for values in row.values]):.2f}"),
    "range": _over_checkpoints(lambda _, values: f"{min(values):.2f} to {max(values):.2f}"),
    "seeds": lambda row: str(len(row.results)),
    "constant answer": lambda row: "-" if row.first.constant is None else f"{row.first.constant:.2f}",
}
