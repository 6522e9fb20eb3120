"""The conditions for a study to continue."""

from __future__ import annotations

from megatron_samoe.evaluation.run_summary import read_records
from megatron_samoe.evaluation.study.definition import Gate
from megatron_samoe.evaluation.study.plan import StudyPlan, last_validation


def problems_of(plan: StudyPlan, gate: Gate) -> list[str]:
    """Returns what a gate finds wrong in the runs of the study's own size that are finished with both of its variants."""
    size, base = next(iter(plan.study.sizes)), gate.baseline or gate.arm
    pairs = [(plan.full(gate.arm, seed, size), plan.full(base, seed, size)) for seed in plan.study.seeds]
    pairs = [pair for pair in pairs if all(map(plan.is_finished, pair))]
    problems = []
    if pairs and gate.at_most is not None:
        mean = sum((last_validation(a) or 0.0) - (last_validation(b) or 0.0) for a, b in pairs) / len(pairs)
        if not mean <= gate.at_most:
            problems.append(
                f"{gate.arm} - {gate.baseline} is {mean:+.4f} nats over {len(pairs)} seeds, at most {gate.at_most:+g} is allowed"
            )
    for run, _ in pairs if gate.load_entropy is not None else []:
        records = [r for r in read_records(run.directory / "metrics.jsonl") if "least_load_entropy" in r]
        known = [r["least_load_entropy"] for r in records if gate.by_step is None or r["iteration"] <= gate.by_step]
        if known and known[-1] < gate.load_entropy:
            when = "at the end" if gate.by_step is None else f"by step {gate.by_step}"
            problems.append(
                f"{run.label} has a least load entropy of {known[-1]:.2f} {when}, not {gate.load_entropy:g}"
            )
    return problems
