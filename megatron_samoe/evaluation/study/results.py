"""What a study came to: means and spreads over seeds, and differences within seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_samoe.evaluation.run_groups import RunGroup
from megatron_samoe.evaluation.run_summary import Table, entropy_text, read_run, sharing_text, speed_text
from megatron_samoe.evaluation.study.definition import Run, Study
from megatron_samoe.evaluation.study.statistics import Difference, differences
from megatron_samoe.evaluation.study.sweeps import Optimum
from megatron_samoe.evaluation.study.text_size import bits_per_byte
from megatron_samoe.parsing import JsonObject


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

    def to_json(self) -> JsonObject:
        """Returns plain values; nan becomes null."""

        def plain(pairs: list[tuple[str, Any]]) -> JsonObject:
            return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in pairs}

        return asdict(self, dict_factory=plain)


@dataclass(frozen=True)
class Comparison:
    """All variants at one size and one number of steps.

    Attributes:
        steps: None for the full length.
        seeds: that every variant has finished, but for those that were given up after the first.
    """

    size: str
    steps: int | None
    seeds: list[int]
    variants: list[VariantResult]


def collect(study: Study, finished: Sequence[Run], given_up: Collection[tuple[str, str]] = ()) -> list[Comparison]:
    """Returns a comparison for each size and length, over the seeds that every variant has finished there; none where no seed
    is. The first is the study's own, if it is there.

    Args:
        given_up: names and sizes of variants that have the first seed alone.
    """
    found = []
    for size in study.sizes:
        for steps in (None, *study.branches):
            variants = [v for v in study.variants if v.is_trained or steps is None]
            done = {(run.variant.name, run.seed): run for run in finished
                    if (run.size, run.length, run.swept) == (size, steps, None)}  # fmt: skip
            short = {v.name for v in variants if (v.edited_from or v.name, size) in given_up}
            seeds = [
                seed for place, seed in enumerate(study.seeds)
                if all((v.name, seed) in done for v in variants if not place or v.name not in short)
            ]  # fmt: skip
            if seeds:
                groups = {
                    v.name: RunGroup(v.name, tuple(
                        read_run(done[v.name, seed].directory) for seed in (seeds[:1] if v.name in short else seeds)
                    ))
                    for v in variants
                }  # fmt: skip
                found.append(Comparison(size, steps, seeds, _compared(study, groups)))
    return found


def _compared(study: Study, groups: dict[str, RunGroup]) -> list[VariantResult]:
    most = max(len(group.losses) for group in groups.values())
    losses = {name: [*g.losses, *[math.nan] * (most - len(g.losses))] for name, g in groups.items()}
    derived = [v.name for v in study.variants if not v.is_trained]
    compared = differences(losses, study.baseline, study.margin, derived)
    return [_result(group, compared.get(name)) for name, group in groups.items()]


def _result(group: RunGroup, difference: Difference | None) -> VariantResult:
    count, runs, loss = group.first.parameters, group.runs, group.loss
    speeds = [run.tokens_per_s for run in runs if run.tokens_per_s is not None]
    return VariantResult(
        group.name, [str(run.directory) for run in runs], sharing_text(group.first.config),
        count.total, count.expert, count.active, group.first.last_trained.get("iteration"), group.losses,
        loss.mean, loss.sd, difference,
        statistics.median(speeds) if speeds else None,
        max((run.peak_memory_bytes for run in runs if run.peak_memory_bytes is not None), default=None),
        min((run.least_load_entropy for run in runs if run.least_load_entropy is not None), default=None),
        bits_per_byte(loss.mean, group.first.config.data, group.first.directory),
    )  # fmt: skip


def unequal_arms(study: Study, results: Sequence[VariantResult], tolerance: float = 0.02) -> list[str]:
    """Returns a warning for each variant whose active parameters differ from the baseline's by more than a share."""
    base = next(r.active_parameters for r in results if r.name == study.baseline)
    return [
        f"{r.name} has {r.active_parameters / base:.3f} times the active parameters of {study.baseline}"
        for r in results
        if abs(r.active_parameters / base - 1) > tolerance
    ]


def results_table(study: Study, results: Sequence[VariantResult]) -> Table:
    """Returns rows of text, the first the heading."""
    rows = [["model", "sharing", "parameters", "expert", "active", "valid. loss", "bits/byte", "sd", f"from {study.baseline}", "pooled",
             "p equal", "p Holm", "load entropy", "tokens/s"]]  # fmt: skip
    for r in results:
        rows.append([
            r.name, r.sharing, *(f"{n / 1e6:.2f} M" for n in (r.total_parameters, r.expert_parameters, r.active_parameters)),
            f"{r.mean:.4f}", "-" if r.bits_per_byte is None else f"{r.bits_per_byte:.4f}",
            "-" if math.isnan(r.sd) else f"{r.sd:.4f}", *_shown(r.difference),
            entropy_text([r.least_load_entropy]), speed_text(r.tokens_per_s),
        ])  # fmt: skip
    return rows


def _shown(difference: Difference | None) -> list[str]:
    if difference is None:
        return ["", "", "", ""]
    texts = [f"+- {difference.half_width:.4f}", f"+- {difference.pooled_half_width:.4f}",
             f"{difference.p_equivalent:.3f}", f"{difference.p_holm:.3f}"]  # fmt: skip
    own, *others = ["-" if "nan" in text else text for text in texts]
    return [f"{difference.mean:+.4f}{'' if own == '-' else ' ' + own}", *others]


def write_results(
    path: Path, study: Study, comparisons: Sequence[Comparison], optima: Mapping[tuple[str, str], Optimum],
    commands: Sequence[str],
) -> None:  # fmt: skip
    """Writes results.json: the study, its results, and the command of every run."""
    own = comparisons[0]
    content = {
        "title": study.title, "baseline": study.baseline, "margin": study.margin, "size": own.size, "seeds": own.seeds,
        "variants": [r.to_json() for r in own.variants],
        "others": [
            {"size": c.size, "steps": c.steps, "seeds": c.seeds, "variants": [r.to_json() for r in c.variants]}
            for c in comparisons[1:]
        ],
        "optima": [
            {"variant": name, "size": size, "option": study.sweep and study.sweep.option, **asdict(found)}
            for (name, size), found in optima.items()
        ],
        "commands": list(commands),
    }  # fmt: skip
    half = path.with_suffix(".tmp")
    half.write_text(json.dumps(content, indent=1) + "\n")
    half.replace(path)
