"""One model over nearby checkpoints, and two models on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_samoe.errors import CheckpointError, ConfigError
from megatron_samoe.evaluation.run_groups import mean_sd
from megatron_samoe.evaluation.zero_shot.results import TaskResult
from megatron_samoe.evaluation.zero_shot.statistics import McNemar, PairedDifference, mcnemar, paired_bootstrap


def choose_iterations(wanted: str, available: Sequence[int], folder: str) -> list[int]:
    """Returns the iterations that `LAST:5` or `100,200` names, in rising order.

    Args:
        available: iterations of complete checkpoints, rising.

    Raises:
        ConfigError: it is neither form.
        CheckpointError: one is not there, or fewer than asked are.
    """
    has = f"{folder} has iterations {', '.join(map(str, available)) or 'none'}"
    form = "must be LAST:N or a list of iterations such as 800,900,1000"
    kind, _, number = wanted.partition(":")
    if kind.upper() == "LAST":
        if not number.isdecimal() or int(number) < 1:
            raise ConfigError("--checkpoints", wanted, form)
        if int(number) > len(available):
            raise CheckpointError(f"--checkpoints {wanted}: there are only {len(available)}; {has}.")
        return list(available[-int(number) :])
    parts = [part.strip() for part in wanted.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError("--checkpoints", wanted, form)
    chosen = sorted({int(part) for part in parts})
    missing = [i for i in chosen if i not in available]
    if missing:
        raise CheckpointError(f"--checkpoints {wanted}: {', '.join(map(str, missing))} is not there; {has}.")
    return chosen


@dataclass(frozen=True)
class Variation:
    """A metric over checkpoints.

    Attributes:
        sd: standard deviation (n - 1); nan for one value.
        stderr: of one checkpoint's value (the newest's), from the number of items.
    """

    task: str
    metric: str
    in_percent: bool
    values: tuple[float, ...]
    mean: float
    sd: float
    low: float
    high: float
    stderr: float


def variations(runs: Sequence[Sequence[TaskResult]]) -> list[Variation]:
    """Returns how each metric varies over checkpoints; each run has the same tasks."""
    found = []
    for results in zip(*runs, strict=True):
        for name, newest in results[-1].metrics.items():
            values = tuple(result.metrics[name].value for result in results)
            over = mean_sd(values)
            facts = (results[-1].task, name, newest.in_percent, values)
            found.append(Variation(*facts, over.mean, over.sd, min(values), max(values), newest.stderr))
    return found


@dataclass(frozen=True)
class Comparison:
    """Two models on a metric of the same items.

    Attributes:
        mcnemar: where the metric is a share of units that are right.
    """

    task: str
    metric: str
    in_percent: bool
    first: float
    second: float
    difference: PairedDifference
    mcnemar: McNemar | None


def compare(first: Sequence[TaskResult], second: Sequence[TaskResult]) -> list[Comparison]:
    """Returns the paired tests of two models' results on the same tasks and items."""
    found = []
    for a, b in zip(first, second, strict=True):
        assert (a.task, a.num_items) == (b.task, b.num_items)
        for name in a.metrics:
            x, y = a.metrics[name], b.metrics[name]
            if not (np.isfinite(x.x_UV).all() and np.isfinite(y.x_UV).all()) or x.x_UV.shape[0] < 2:
                continue
            test = mcnemar(x.x_UV[:, 0] > 0, y.x_UV[:, 0] > 0) if x.is_binary and y.is_binary else None
            difference = paired_bootstrap(x.x_UV, y.x_UV, x.finish)
            found.append(Comparison(a.task, name, x.in_percent, x.value, y.value, difference, test))
    return found
