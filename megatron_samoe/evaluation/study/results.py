"""What a study came to: means and spreads over seeds, and differences within seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_samoe.evaluation.run_groups import RunGroup
from megatron_samoe.evaluation.run_summary import Table, entropy_text, read_run, sharing_text, speed_text
from megatron_samoe.evaluation.study.definition import Run, Study
from megatron_samoe.parsing import JsonObject

#: Student's t for a two-sided interval of 95 %, by degrees of freedom; beyond the table the last serves, which is wider.
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Difference:
    """Mean of differences within pairs.

    Attributes:
        half_width: of the 95 % interval by Student's t; nan for one pair.
    """

    mean: float
    half_width: float


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Returns how values differ from a baseline's, pair by pair: one seed draws the same samples in all variants."""
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    count = len(differences)
    if count < 2:
        return Difference(differences[0], math.nan)
    quantile = _T_95[min(count - 1, len(_T_95)) - 1]
    return Difference(statistics.mean(differences), quantile * statistics.stdev(differences) / math.sqrt(count))


@dataclass(frozen=True)
class VariantResult:
    """A variant over all seeds that are finished for it and the baseline.

    Attributes:
        sharing: how MoE layers share experts, see `run_summary.sharing_text`.
        losses: validation loss per seed, nats per token.
        sd: standard deviation over seeds, with n - 1; nan for one.
        difference: from the baseline; None for the baseline.
        tokens_per_s: median over seeds of training's; None where nothing was trained.
        least_load_entropy: of any layer and seed after training; None without experts.
    """

    name: str
    directories: list[str]
    sharing: str
    total_parameters: int
    expert_parameters: int
    active_parameters: int
    losses: list[float]
    mean: float
    sd: float
    difference: Difference | None
    tokens_per_s: float | None
    peak_memory_bytes: int | None
    least_load_entropy: float | None = None

    def to_json(self) -> JsonObject:
        """Returns plain values; nan becomes null."""

        def plain(pairs: list[tuple[str, Any]]) -> JsonObject:
            return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in pairs}

        return asdict(self, dict_factory=plain)


def collect(study: Study, finished: Sequence[Run]) -> list[VariantResult]:
    """Returns a result for each variant, over the seeds that every variant has finished."""
    done = {(run.variant.name, run.seed): run for run in finished}
    seeds = [seed for seed in study.seeds if all((v.name, seed) in done for v in study.variants)]
    if not seeds:
        return []
    groups = {
        v.name: RunGroup(v.name, tuple(read_run(done[v.name, seed].directory) for seed in seeds))
        for v in study.variants
    }
    baseline = groups[study.baseline].losses
    return [_result(group, None if name == study.baseline else baseline) for name, group in groups.items()]


def _result(group: RunGroup, baseline: Sequence[float] | None) -> VariantResult:
    count, runs, loss = group.first.parameters, group.runs, group.loss
    speeds = [run.tokens_per_s for run in runs if run.tokens_per_s is not None]
    return VariantResult(
        group.name, [str(run.directory) for run in runs], sharing_text(group.first.config),
        count.total, count.expert, count.active, group.losses,
        loss.mean, loss.sd, None if baseline is None else paired_difference(group.losses, baseline),
        statistics.median(speeds) if speeds else None,
        max((run.peak_memory_bytes for run in runs if run.peak_memory_bytes is not None), default=None),
        min((run.least_load_entropy for run in runs if run.least_load_entropy is not None), default=None),
    )  # fmt: skip


def results_table(study: Study, results: Sequence[VariantResult]) -> Table:
    """Returns rows of text, the first the heading."""
    rows = [["model", "sharing", "parameters", "expert", "active", "valid. loss", "sd", f"from {study.baseline}",
             "load entropy", "tokens/s"]]  # fmt: skip
    for r in results:
        rows.append([
            r.name, r.sharing, *(f"{n / 1e6:.2f} M" for n in (r.total_parameters, r.expert_parameters, r.active_parameters)),
            f"{r.mean:.4f}", "-" if math.isnan(r.sd) else f"{r.sd:.4f}", _shown(r.difference),
            entropy_text([r.least_load_entropy]), speed_text(r.tokens_per_s),
        ])  # fmt: skip
    return rows


def _shown(difference: Difference | None) -> str:
    if difference is None:
        return ""
    width = "" if math.isnan(difference.half_width) else f" +- {difference.half_width:.4f}"
    return f"{difference.mean:+.4f}{width}"


def write_results(path: Path, study: Study, seeds: int, results: Sequence[VariantResult], commands: list[str]) -> None:
    """Writes results.json: the study, its results, and the command of every run."""
    content = {
        "title": study.title, "baseline": study.baseline, "seeds": list(study.seeds[:seeds]),
        "variants": [r.to_json() for r in results], "commands": commands,
    }  # fmt: skip
    path.write_text(json.dumps(content, indent=1) + "\n")
