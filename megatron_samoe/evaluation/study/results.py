"""The results of a study: means and spreads over seeds, and differences within seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_samoe.evaluation.run_groups import RunGroup
from megatron_samoe.evaluation.run_summary import (
    Table,
    entropy_text,
    millions_text,
    read_run,
    sharing_text,
    speed_text,
    table,
)
from megatron_samoe.evaluation.study.definition import Run, Study, Variant
from megatron_samoe.evaluation.study.statistics import Difference, differences
from megatron_samoe.evaluation.study.sweeps import Optimum
from megatron_samoe.evaluation.study.text_size import bits_per_byte
from megatron_samoe.parsing import JsonObject, write_atomically


@dataclass(frozen=True)
class VariantResult:
    """A variant over all seeds that are finished for it and the baseline.

    Attributes:
        sharing: how MoE layers share experts, see `run_summary.sharing_text`.
        steps: of training; None for a model made by editing another.
        losses: validation loss per seed, nats per token.
        sd: standard deviation over seeds, with n - 1; nan for one.
        difference: from the baseline; None for the baseline. See `statistics.Difference`.
        tokens_per_s: median over seeds of training's; None where nothing was trained.
        least_load_entropy: of any layer and seed after training; None without experts.
        bits_per_byte: the mean loss over the validation set's text; None where that is not at hand.
    """

    name: str
    directories: list[str]
    sharing: str
    total_parameters: int
    expert_parameters: int
    active_parameters: int
    steps: int | None
    losses: list[float]
    mean: float
    sd: float
    difference: Difference | None
    tokens_per_s: float | None
    peak_memory_bytes: int | None
    least_load_entropy: float | None = None
    bits_per_byte: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All variants at one size and one number of steps.

    Attributes:
        steps: None for the full length.
        seeds: that every variant has finished, except those that were given up after the first.
    """

    size: str
    steps: int | None
    seeds: list[int]
    variants: list[VariantResult]


def collect(study: Study, finished: Sequence[Run], given_up: Collection[tuple[str, str]] = ()) -> list[Comparison]:
    """Returns a comparison for each size and length, over the seeds that every variant has finished there; none where no seed
    is. The first is the study's own, if it is there.

    Args:
        given_up: names and sizes of variants that have only the first seed.
    """
    lengths = [(size, steps) for size in study.sizes for steps in (None, *study.branches)]
    found = [_comparison(study, finished, given_up, size, steps) for size, steps in lengths]
    return [comparison for comparison in found if comparison is not None]


def _comparison(
    study: Study, finished: Sequence[Run], given_up: Collection[tuple[str, str]], size: str, steps: int | None
) -> Comparison | None:
    variants = [v for v in study.variants if v.is_trained or steps is None]
    alike = [run for run in finished if (run.size, run.length, run.swept) == (size, steps, None)]
    done = {(run.variant.name, run.seed): run for run in alike}

    def seeds_of(variant: Variant) -> Sequence[int]:
        return study.seeds[:1] if (variant.edited_from or variant.name, size) in given_up else study.seeds

    seeds = [s for s in study.seeds if all((v.name, s) in done for v in variants if s in seeds_of(v))]
    if not seeds:
        return None
    groups = {
        v.name: RunGroup(v.name, tuple(read_run(done[v.name, s].directory) for s in seeds if s in seeds_of(v)))
        for v in variants
    }
    return Comparison(size, steps, seeds, _compared(study, groups))


def _compared(study: Study, groups: Mapping[str, RunGroup]) -> list[VariantResult]:
    most = max(len(group.losses) for group in groups.values())
    losses = {name: [*g.losses, *[math.nan] * (most - len(g.losses))] for name, g in groups.items()}
    derived = [v.name for v in study.variants if not v.is_trained]
    compared = differences(losses, study.baseline, study.margin, derived)
    return [_result(group, compared.get(name)) for name, group in groups.items()]


def _result(group: RunGroup, difference: Difference | None) -> VariantResult:
    first, runs = group.first, group.runs
    speeds = [run.tokens_per_s for run in runs if run.tokens_per_s is not None]
    return VariantResult(
        name=group.name,
        directories=[str(run.directory) for run in runs],
        sharing=sharing_text(first.config),
        total_parameters=first.parameters.total,
        expert_parameters=first.parameters.expert,
        active_parameters=first.parameters.active,
        steps=first.last_trained.get("iteration"),
        losses=group.losses,
        mean=group.loss.mean,
        sd=group.loss.sd,
        difference=difference,
        tokens_per_s=statistics.median(speeds) if speeds else None,
        peak_memory_bytes=max((r.peak_memory_bytes for r in runs if r.peak_memory_bytes is not None), default=None),
        least_load_entropy=min((r.least_load_entropy for r in runs if r.least_load_entropy is not None), default=None),
        bits_per_byte=bits_per_byte(group.loss.mean, first.config.data, first.directory),
    )


def unequal_arms(study: Study, results: Sequence[VariantResult], tolerance: float = 0.02) -> list[str]:
    """Returns a warning for each variant whose active parameters differ from the baseline's by more than a share."""
    base = next(r.active_parameters for r in results if r.name == study.baseline)
    return [
        f"{r.name} has {r.active_parameters / base:.3f} times the active parameters of {study.baseline}"
        for r in results
        if abs(r.active_parameters / base - 1) > tolerance
    ]


def results_table(study: Study, results: Sequence[VariantResult]) -> Table:
    """Returns a row of text for each model, below the headings."""
    columns: dict[str, Callable[[VariantResult], str]] = {
        "model": lambda r: r.name,
        "sharing": lambda r: r.sharing,
        "parameters": lambda r: millions_text(r.total_parameters),
        "expert": lambda r: millions_text(r.expert_parameters),
        "active": lambda r: millions_text(r.active_parameters),
        "valid. loss": lambda r: f"{r.mean:.4f}",
        "bits/byte": lambda r: "-" if r.bits_per_byte is None else f"{r.bits_per_byte:.4f}",
        "sd": lambda r: _known("{:.4f}", r.sd),
        f"from {study.baseline}": _of_difference(lambda d: f"{d.mean:+.4f}{_known(' +- {:.4f}', d.half_width, '')}"),
        "pooled": _of_difference(lambda d: _known("+- {:.4f}", d.pooled_half_width)),
        "p equal": _of_difference(lambda d: _known("{:.3f}", d.p_equivalent)),
        "p Holm": _of_difference(lambda d: _known("{:.3f}", d.p_holm)),
        "load entropy": lambda r: entropy_text([r.least_load_entropy]),
        "tokens/s": lambda r: speed_text(r.tokens_per_s),
    }
    return table(columns, results)


def _of_difference(show: Callable[[Difference], str]) -> Callable[[VariantResult], str]:
    """Returns a column that is empty for the baseline."""
    return lambda r: "" if r.difference is None else show(r.difference)


def _known(form: str, value: float, otherwise: str = "-") -> str:
    return otherwise if math.isnan(value) else form.format(value)


def write_results(
    path: Path,
    study: Study,
    comparisons: Sequence[Comparison],
    optima: Mapping[tuple[str, str], Optimum],
    commands: Sequence[str],
) -> None:
    """Writes results.json: the study, its results, and the command of every run."""
    own, *others = comparisons
    content = {
        "title": study.title,
        "baseline": study.baseline,
        "margin": study.margin,
        "size": own.size,
        "seeds": own.seeds,
        "variants": _plain(own)["variants"],
        "others": [_plain(comparison) for comparison in others],
        "optima": [
            {"variant": name, "size": size, "option": study.sweep and study.sweep.option, **asdict(found)}
            for (name, size), found in optima.items()
        ],
        "commands": list(commands),
    }
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def _plain(comparison: Comparison) -> JsonObject:
    """Returns plain values; nan becomes null."""

    def without_nan(pairs: list[tuple[str, Any]]) -> JsonObject:
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in pairs}

    return asdict(comparison, dict_factory=without_nan)
