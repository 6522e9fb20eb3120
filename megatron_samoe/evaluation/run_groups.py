"""Runs that differ only in their seed, taken together: the rows and colours of a report."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_samoe.config.derived import num_moe_layers
from megatron_samoe.errors import ConfigError
from megatron_samoe.evaluation.run_summary import (
    RunSummary,
    Table,
    is_noise,
    known_text,
    megabytes_text,
    millions_text,
    perplexity_text,
    read_run,
    sharing_text,
    table,
)
from megatron_samoe.evaluation.study.text_size import bits_per_byte

_SEED = re.compile(r"seed[-_]?\d+")


@dataclass(frozen=True)
class MeanSd:
    """Mean and standard deviation (n - 1) of some values; the deviation of one value is nan."""

    mean: float
    sd: float
    count: int

    def text(self, decimals: int) -> str:
        """Returns "5.123 ± 0.010", without a deviation of one run."""
        spread = "" if math.isnan(self.sd) else f" ± {self.sd:.{decimals}f}"
        return f"{self.mean:.{decimals}f}{spread}"


def mean_sd(values: Sequence[float]) -> MeanSd:
    """Returns mean and deviation of values."""
    return MeanSd(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan, len(values))


@dataclass(frozen=True)
class RunGroup:
    """One model, trained with one seed or several."""

    name: str
    runs: tuple[RunSummary, ...]

    @property
    def first(self) -> RunSummary:
        """The run that represents the group where one is shown."""
        return self.runs[0]

    @property
    def losses(self) -> list[float]:
        """Last validation loss of each seed, nats per token."""
        return [run.validation["validation_loss"] for run in self.runs]

    @property
    def loss(self) -> MeanSd:
        """Last validation loss over seeds."""
        return mean_sd(self.losses)

    @property
    def expert_layout(self) -> str:
        """dense, moe or samoe."""
        return self.first.config.moe.expert_layout if num_moe_layers(self.first.config) else "dense"

    @property
    def tokens(self) -> str:
        """Tokens that its runs were trained on, in millions; "-" where that is not recorded."""
        counts = {run.num_tokens for run in self.runs if run.num_tokens is not None}
        texts = dict.fromkeys(f"{n / 1e6:,.2f} M" for n in (min(counts), max(counts))) if counts else ["-"]
        return " to ".join(texts)

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of the logged intervals of all seeds, without each run's first, which warms up."""
        return [r["tokens_per_s"] for run in self.runs for r in run.trained[1:]]

    @property
    def tokens_per_s(self) -> float | None:
        """Median over seeds of training's; None where nothing was trained."""
        known = [run.tokens_per_s for run in self.runs if run.tokens_per_s is not None]
        return statistics.median(known) if known else None

    @property
    def peak_memory_bytes(self) -> int | None:
        """The most memory that any rank of any seed held; None where nothing was trained."""
        return max((run.peak_memory_bytes for run in self.runs if run.peak_memory_bytes is not None), default=None)

    @property
    def least_load_entropy(self) -> float | None:
        """The least of any layer and seed after training; None without experts."""
        return min((run.least_load_entropy for run in self.runs if run.least_load_entropy is not None), default=None)

    @property
    def bits_per_byte(self) -> float | None:
        """The mean loss over the validation set's text; None where that is not at hand."""
        return bits_per_byte(self.loss.mean, self.first.config.data, self.first.directory)

    def contains(self, path: Path) -> bool:
        """Whether a path is one of the runs' folders or below."""
        return any(path.absolute().is_relative_to(run.directory.absolute()) for run in self.runs)


Groups = Sequence[RunGroup]
#: What a column of a table shows of a model.
Column = Callable[[RunGroup], str]

#: Every column of models, of which each table has some.
COLUMNS: dict[str, Column] = {
    "model": lambda group: group.name,
    "seeds": lambda group: str(len(group.runs)),
    "training tokens": lambda group: group.tokens,
    "optimizer, rate": lambda group: _optimizer_text(group.first),
    "sharing": lambda group: sharing_text(group.first.config),
    "parameters": lambda group: millions_text(group.first.parameters.total),
    "expert": lambda group: millions_text(group.first.parameters.expert),
    "active": lambda group: millions_text(group.first.parameters.active),
    "checkpoint": lambda group: megabytes_text(group.first.checkpoint_bytes, 1),
    "valid. loss": lambda group: group.loss.text(4),
    "perplexity": lambda group: perplexity_text(group.loss.mean),
    "bits/byte": lambda group: known_text("{:.4f}", group.bits_per_byte),
    "load entropy": lambda group: known_text("{:.2f}", group.least_load_entropy),
    "tokens/s": lambda group: known_text("{:,.0f}", None if is_noise(group.speeds) else group.tokens_per_s),
    "peak memory/rank": lambda group: megabytes_text(group.peak_memory_bytes),
}


def columns(*names: str) -> dict[str, Column]:
    """Returns some columns by name."""
    return {name: COLUMNS[name] for name in names}


def _optimizer_text(run: RunSummary) -> str:
    """Returns what trained a model, and its highest learning rate; a dash where nothing was trained."""
    options = run.config.optimizer
    return f"{options.optimizer}, {options.lr:g}" if run.trained else "-"


def summary_table(runs: Sequence[RunSummary]) -> Table:
    """Returns a row of text for each run, below the headings."""
    sizes = columns("model", "parameters", "expert", "active", "checkpoint", "valid. loss", "perplexity")
    measured = columns("load entropy", "tokens/s", "peak memory/rank")
    return table(sizes | measured, [RunGroup(run.name, (run,)) for run in runs])


def group_runs(runs: Sequence[RunSummary]) -> list[RunGroup]:
    """Returns runs by model: folders `moe/seed-1` and `moe/seed-2` are one, any other folder is a model.

    A model has its folder's name, with the folders above that distinguish it from the other models.

    Raises:
        ConfigError: a folder is given twice.
    """
    found: dict[Path, list[RunSummary]] = {}
    for run in runs:
        folder = run.directory.absolute()
        found.setdefault(folder.parent if _SEED.fullmatch(folder.name) else folder, []).append(run)
    _refuse_doubles(runs)
    return [RunGroup(_name(home, list(found)), tuple(members)) for home, members in found.items()]


def _name(home: Path, homes: Sequence[Path]) -> str:
    count = 1
    while count < len(home.parts) and sum(other.parts[-count:] == home.parts[-count:] for other in homes) > 1:
        count += 1
    return "/".join(home.parts[-count:])


def _refuse_doubles(runs: Sequence[RunSummary]) -> None:
    """Raises ConfigError where one run would count as two seeds."""
    seen: set[Path] = set()
    for run in runs:
        folder = run.directory.resolve()
        if folder in seen:
            raise ConfigError("RUN_DIR", str(run.directory), "is given twice")
        seen.add(folder)


def read_groups(directories: Mapping[str, Sequence[Path]]) -> list[RunGroup]:
    """Returns the groups of named folders, as a study has them.

    Raises:
        CheckpointError: one is not the folder of a run.
        ConfigError: a model has a folder twice.
    """
    groups = [RunGroup(name, tuple(read_run(path) for path in paths)) for name, paths in directories.items()]
    for group in groups:
        _refuse_doubles(group.runs)
    return groups
