"""The conditions for a study to continue."""

from __future__ import annotations

from megatron_samoe.evaluation.run_summary import read_records
from megatron_samoe.evaluation.study.definition import Gate, Run
from megatron_samoe.evaluation.study.plan import StudyPlan, last_validation


def problems_of(plan: StudyPlan, gate: Gate) -> list[str]:
    """Returns what a gate finds wrong in the runs of full length that are finished with both of its variants."""
    pairs = _pairs(plan, gate)
    if not pairs:
        return []
    problems = []
    if gate.at_most is not None:
        mean = sum((last_validation(a) or 0.0) - (last_validation(b) or 0.0) for a, b in pairs) / len(pairs)
        if not mean <= gate.at_most:
            problems.append(
                f"{gate.arm} - {gate.baseline} is {mean:+.4f} nats over {len(pairs)} seeds, at most {gate.at_most:+g} is allowed"
            )
    for run, _ in pairs if gate.load_entropy is not None else []:
        found = _load_entropy(run, gate.by_step)
        if found is not None and found < gate.load_entropy:  # type: ignore[operator]
            when = "at the end" if gate.by_step is None else f"by step {gate.by_step}"
            problems.append(f"{run.label} has a least load entropy of {found:.2f} {when}, not {gate.load_entropy:g}")
    return problems


def _pairs(plan: StudyPlan, gate: Gate) -> list[tuple[Run, Run]]:
    size = next(iter(plan.study.sizes))
    pairs = [(plan.full(gate.arm, s, size), plan.full(gate.baseline or gate.arm, s, size)) for s in plan.study.seeds]
    return [pair for pair in pairs if all(map(plan.is_finished, pair))]


def _load_entropy(run: Run, step: int | None) -> float | None:
    """Returns the least load entropy of any layer in the last record up to a step."""
    records = [r for r in read_records(run.directory / "metrics.jsonl") if "least_load_entropy" in r]
    known = [r for r in records if step is None or r["iteration"] <= step]
    return known[-1]["least_load_entropy"] if known else None
