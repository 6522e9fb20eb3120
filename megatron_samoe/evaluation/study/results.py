"""The results of a study: means and spreads over seeds, and differences within seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_samoe.evaluation.run_groups import Column, Groups, RunGroup, columns
from megatron_samoe.evaluation.run_summary import Table, known_text, read_run, sharing_text, table
from megatron_samoe.evaluation.study.definition import Run, Study, Variant
from megatron_samoe.evaluation.study.statistics import Difference, differences
from megatron_samoe.evaluation.study.sweeps import Optimum
from megatron_samoe.parsing import JsonObject, without_infinities, write_atomically


@dataclass(frozen=True)
class Comparison:
    """All variants at one size.

    Attributes:
        seeds: that every variant has finished, except those that were given up after the first.
        groups: runs of each variant.
        differences: from the baseline, by name of every other variant.
    """

    size: str
    seeds: list[int]
    groups: Groups
    differences: Mapping[str, Difference]

    def to_json(self) -> JsonObject:
        """Returns plain values; nan becomes null."""
        variants = [_plain(group, self.differences.get(group.name)) for group in self.groups]
        return without_infinities({"size": self.size, "seeds": self.seeds, "variants": variants})


def collect(study: Study, finished: Sequence[Run], given_up: Collection[tuple[str, str]] = ()) -> list[Comparison]:
    """Returns a comparison for each size, over the seeds that every variant has finished there; none where no seed
    is. The first is the study's own, if it is there.

    Args:
        given_up: names and sizes of variants that have only the first seed.
    """
    found = [_comparison(study, finished, given_up, size) for size in study.sizes]
    return [comparison for comparison in found if comparison is not None]


def _comparison(
    study: Study, finished: Sequence[Run], given_up: Collection[tuple[str, str]], size: str
) -> Comparison | None:
    variants = study.variants
    done = {(run.variant.name, run.seed): run for run in finished if (run.size, run.swept) == (size, None)}

    def seeds_of(variant: Variant) -> Sequence[int]:
        return study.seeds[:1] if (variant.edited_from or variant.name, size) in given_up else study.seeds

    seeds = [s for s in study.seeds if all((v.name, s) in done for v in variants if s in seeds_of(v))]
    if not seeds:
        return None
    groups = [
        RunGroup(v.name, tuple(read_run(done[v.name, s].directory) for s in seeds if s in seeds_of(v)))
        for v in variants
    ]
    most = max(len(group.losses) for group in groups)
    losses = {group.name: [*group.losses, *[math.nan] * (most - len(group.losses))] for group in groups}
    derived = [v.name for v in study.variants if not v.is_trained]
    return Comparison(size, seeds, groups, differences(losses, study.baseline, study.margin, derived))


def unequal_arms(study: Study, groups: Groups, tolerance: float = 0.02) -> list[str]:
    """Returns a warning for each variant whose active parameters differ from the baseline's by more than a share."""
    active = {group.name: group.first.parameters.active for group in groups}
    base = active[study.baseline]
    return [
        f"{name} has {count / base:.3f} times the active parameters of {study.baseline}"
        for name, count in active.items()
        if abs(count / base - 1) > tolerance
    ]


def results_table(study: Study, comparison: Comparison) -> Table:
    """Returns a row of text for each model, below the headings."""

    def of_difference(show: Callable[[Difference], str]) -> Column:
        found = comparison.differences
        return lambda group: show(found[group.name]) if group.name in found else ""

    compared = {
        f"from {study.baseline}": of_difference(lambda d: f"{d.mean:+.4f}{known_text(' +- {:.4f}', d.half_width, '')}"),
        "pooled": of_difference(lambda d: known_text("+- {:.4f}", d.pooled_half_width)),
        "p equal": of_difference(lambda d: known_text("{:.3f}", d.p_equivalent)),
        "p Holm": of_difference(lambda d: known_text("{:.3f}", d.p_holm)),
    }
    models = columns("model", "sharing", "parameters", "expert", "active", "valid. loss", "bits/byte")
    return table({**models, **compared, **columns("load entropy", "tokens/s")}, comparison.groups)


def write_results(
    path: Path,
    study: Study,
    comparisons: Sequence[Comparison],
    optima: Mapping[tuple[str, str], Optimum],
    commands: Sequence[str],
) -> None:
    """Writes results.json: the study, its results, and the command of every run."""
    own, *others = (comparison.to_json() for comparison in comparisons)
    content = {
        "title": study.title,
        "baseline": study.baseline,
        "margin": study.margin,
        "size": own["size"],
        "seeds": own["seeds"],
        "variants": own["variants"],
        "others": others,
        "optima": [
            {"variant": name, "size": size, "option": study.sweep and study.sweep.option, **asdict(found)}
            for (name, size), found in optima.items()
        ],
        "commands": list(commands),
    }
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def _plain(group: RunGroup, difference: Difference | None) -> JsonObject:
    """Returns what results.json has of a model; steps and speed are null for one that was made by editing another."""
    parameters, last = group.first.parameters, group.first.last_trained
    return {
        "name": group.name,
        "directories": [str(run.directory) for run in group.runs],
        "sharing": sharing_text(group.first.config),
        "total_parameters": parameters.total,
        "expert_parameters": parameters.expert,
        "active_parameters": parameters.active,
        "steps": last.get("iteration"),
        "losses": group.losses,
        "mean": group.loss.mean,
        "sd": group.loss.sd,
        "difference": difference and asdict(difference),
        "tokens_per_s": group.tokens_per_s,
        "peak_memory_bytes": group.peak_memory_bytes,
        "least_load_entropy": group.least_load_entropy,
        "bits_per_byte": group.bits_per_byte,
    }
