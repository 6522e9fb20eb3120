"""The tables of a report, as rows of text; the first row is the heading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_samoe.evaluation.measurements import ZeroShot, of_group
from megatron_samoe.evaluation.run_groups import Groups, RunGroup, mean_sd
from megatron_samoe.evaluation.run_summary import (
    RunSummary,
    Table,
    entropy_text,
    megabytes_text,
    parameter_texts,
    perplexity_text,
    sharing_text,
)
from megatron_samoe.evaluation.study.text_size import bits_per_byte


def results_table(groups: Groups) -> Table:
    """Returns parameters, checkpoint sizes and validation losses."""
    rows = [["model", "seeds", "training tokens", "optimizer, rate", "sharing", "parameters", "expert", "active", "checkpoint",
             "validation loss", "perplexity", "bits/byte", "load entropy", "peak memory/rank"]]  # fmt: skip
    for group in groups:
        memory = [run.peak_memory_bytes for run in group.runs if run.peak_memory_bytes is not None]
        rows.append([
            group.name, str(len(group.runs)), group.tokens, _optimizer_text(group), sharing_text(group.first.config),
            *parameter_texts(group.first.parameters),
            megabytes_text(group.first.checkpoint_bytes, 1), group.loss.text(4), perplexity_text(group.loss.mean),
            _bits_text(group), entropy_text(run.least_load_entropy for run in group.runs),
            megabytes_text(max(memory, default=None)),
        ])  # fmt: skip
    return rows


def _bits_text(group: RunGroup) -> str:
    bits = bits_per_byte(group.loss.mean, group.first.config.data, group.first.directory)
    return "-" if bits is None else f"{bits:.4f}"


def _optimizer_text(group: RunGroup) -> str:
    """Returns what trained a model, and its highest learning rate; a dash where nothing was trained."""
    options = group.first.config.optimizer
    return f"{options.optimizer}, {options.lr:g}" if group.first.trained else "-"


def glance_table(groups: Groups) -> Table:
    """Returns loss and size of every model, the best first."""
    best = min(group.loss.mean for group in groups)
    rows = [["model", "validation loss", "from the best", "parameters", "active"]]
    for group in sorted(groups, key=lambda group: group.loss.mean):
        total, _, active = parameter_texts(group.first.parameters)
        rows.append([group.name, group.loss.text(4), f"+{group.loss.mean - best:.4f}", total, active])
    return rows


def glance_text(groups: Groups, margin: float) -> str:
    """Returns the best model, and the smallest that is as good within a margin of nats."""
    best = min(groups, key=lambda group: group.loss.mean)
    near = [group for group in groups if group.loss.mean - best.loss.mean <= margin]
    small = min(near, key=lambda group: group.first.parameters.total)
    total, _, _ = parameter_texts(best.first.parameters)
    text = f"Best: {best.name}, {best.loss.text(4)} nats per token with {total} parameters."
    if small is not best:
        total, _, _ = parameter_texts(small.first.parameters)
        text += (
            f" The smallest within {margin} of it: {small.name}, +{small.loss.mean - best.loss.mean:.4f} with {total}."
        )
    else:
        text += f" No smaller model comes within {margin} of it."
    return text


def cost_table(groups: Groups, axes: Mapping[str, Mapping[str, float]]) -> Table:
    """Returns every cost of every model beside its loss."""
    rows = [["model", *axes, "validation loss"]]
    for group in groups:
        costs = [_figure(values[group.name]) if group.name in values else "-" for values in axes.values()]
        rows.append([group.name, *costs, group.loss.text(4)])
    return rows


def _figure(value: float) -> str:
    """Returns three digits, or all before the point where there are more."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def speed_table(groups: Groups) -> Table:
    """Returns tokens per second, and where and how they were trained."""
    rows = [["model", "tokens/s", "quartiles", "intervals", "device", "ranks x threads", "layout", "batch x sequence",
             "steps"]]  # fmt: skip
    for group in groups:
        speeds = [r["tokens_per_s"] for run in group.runs for r in run.trained[1:]]
        if not speeds:
            continue
        low, median, high = np.quantile(speeds, (0.25, 0.5, 0.75))
        config = group.first.config
        described = next((run for run in group.runs if run.machine), group.first)
        machine = described.machine
        ranks = f"{machine['ranks']} x {machine['threads_per_rank']}" if machine else "not recorded"
        batch = config.training.global_batch_size or config.training.micro_batch_size
        rows.append([
            group.name, f"{median:,.0f}", f"{low:,.0f} to {high:,.0f}", str(len(speeds)), _device(group.runs), ranks,
            _layout(described), f"{batch} x {config.model.seq_length}", str(group.first.trained[-1]["iteration"]),
        ])  # fmt: skip
    return rows


def _device(runs: Sequence[RunSummary]) -> str:
    names = {f"{run.machine['device_name']}, {run.machine['device']}" for run in runs if run.machine}
    if not names:
        return "GPU, name not recorded" if any("mfu" in r for r in runs[0].trained) else "not recorded"
    return "; ".join(sorted(names))


def _layout(run: RunSummary) -> str:
    if not run.machine:
        return "not recorded"
    sizes = [f"{name.replace('_', '-')} {size}" for name, size in run.machine["layout"].items() if size > 1]
    return ", ".join(sizes) or "one rank"


def zero_shot_table(groups: Groups, results: Sequence[ZeroShot]) -> Table:
    """Returns every metric of every model, task by task, with its variation over checkpoints and over seeds."""
    rows = [
        ["task", "metric", "model", "items", "value", "over checkpoints", "sd", "range", "seeds", "constant answer"]
    ]
    of = {group.name: of_group(group, results) for group in groups}
    order = list(dict.fromkeys((r.task, r.metric) for r in results))
    previous = ""
    for task, metric in order:
        for name, found in of.items():
            mine = [r for r in found if (r.task, r.metric) == (task, metric)]
            if mine:
                rows.append([task if task != previous else "", metric, name, *_zero_shot_cells(mine)])
                previous = task
    return rows


def _zero_shot_cells(mine: Sequence[ZeroShot]) -> list[str]:
    """Cells of a model's results, one per seed."""
    first, seeds = mine[0], str(len(mine))
    items = " to ".join(dict.fromkeys(str(n) for n in (min(r.items for r in mine), max(r.items for r in mine))))
    constant = "-" if first.constant is None else f"{first.constant:.2f}"
    values = [v for r in mine for v in r.values if v is not None]
    newest = [r.value for r in mine if r.value is not None]
    value, over = "-", ["-", "-", "-"]
    if len(mine) > 1 and newest:
        value = mean_sd(newest).text(2)
    elif newest:
        value = f"{newest[0]:.2f}" + ("" if first.stderr is None else f" ± {first.stderr:.2f}")
    if newest and len(first.values) > 1:
        # Over checkpoints of one seed; with several seeds, the mean of their deviations.
        within = [mean_sd([v for v in r.values if v is not None]).sd for r in mine]
        over = [f"{len(first.values)}: {np.mean(values):.2f}", f"{np.mean(within):.2f}",
                f"{min(values):.2f} to {max(values):.2f}"]  # fmt: skip
    return [items, value, *over, seeds, constant]
