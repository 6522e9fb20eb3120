"""Studies that train what is needed and no more: rates that were tried, and variants that are given up after a seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_samoe.evaluation.run_summary import read_records
from megatron_samoe.evaluation.study import plan as plan_module
from megatron_samoe.evaluation.study import results_store
from megatron_samoe.evaluation.study.definition import Run, read_study
from megatron_samoe.evaluation.study.plan import StudyPlan
from tests.unit.evaluation.test_study import write_kept, write_study

RUNS = {"own": {"expert-layout": "moe"}, "shared": {"expert-layout": "samoe"}}
SWEEP = {"option": "lr", "values": [0.01, 0.02, 0.04], "choose": "tried", "extensions": 1}


def finish(plan: StudyPlan, run: Run, loss: float) -> None:
    """Leaves what a finished run leaves, as far as a plan asks."""
    run.directory.mkdir(parents=True)
    (run.directory / "metrics.jsonl").write_text(json.dumps({"iteration": 2, "validation_loss": loss}) + "\n")
    write_kept(run.directory, plan.config_of(run))


def finish_sweep(plan: StudyPlan, variant: str, losses: Sequence[float]) -> list[Run]:
    swept = [run for run in plan.all_runs() if run.swept and run.variant.name == variant]
    for run, loss in zip(swept, losses, strict=True):
        finish(plan, run, loss)
    return swept


def plan_of(folder: Path, **changes: object) -> StudyPlan:
    study = read_study(write_study(folder, runs=RUNS, derived=None, baseline="own", **changes))
    return StudyPlan(study, folder / "runs", ())


def test_the_sweeps_best_run_is_found_in_place_of_the_first_seeds(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, sweep=SWEEP)
    swept = finish_sweep(plan, "shared", (3.0, 2.8, 2.9))
    first, second = [run for run in plan.plan() if run.variant.name == "shared"]
    assert plan.optima()[("shared", "")].value == 0.02
    assert plan.key_of(first) == plan.key_of(swept[1]) != plan.key_of(second)
    plan.store = tmp_path / "store"
    results_store.put(plan.store, swept[1].directory)
    assert plan.take(first) and plan.is_finished(first), "so it is not trained again"


def test_a_value_between_is_the_vertex_of_numpys_parabola(tmp_path: Path) -> None:
    plan, losses = plan_of(tmp_path, sweep=SWEEP | {"choose": "vertex"}), (3.0, 2.8, 2.9)
    finish_sweep(plan, "own", losses)
    a, b, _ = np.polyfit(np.log(SWEEP["values"]), losses, 2)
    assert plan.optima()[("own", "")].value == pytest.approx(np.exp(-b / (2 * a)))


def test_a_best_value_at_an_end_is_followed_by_one_beyond(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, sweep=SWEEP)
    finish_sweep(plan, "own", (2.7, 2.8, 2.9))
    beyond = [r for r in plan.all_runs() if r.swept == 0.005]
    assert len(beyond) == 1 and not plan.optima()
    finish(plan, beyond[0], 2.75)
    assert plan.optima()[("own", "")].value == 0.01


def test_records_are_read_once_and_again_when_they_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    monkeypatch.setattr(plan_module, "read_records", lambda path: read.append(path) or read_records(path))
    plan = plan_of(tmp_path, sweep=SWEEP)
    swept = finish_sweep(plan, "own", (3.0, 2.8, 2.9))
    assert [plan.optima()[("own", "")].value for _ in range(5)] == [0.02] * 5
    assert sorted(read) == sorted(run.directory / "metrics.jsonl" for run in swept)
    (swept[2].directory / "metrics.jsonl").write_text(json.dumps({"iteration": 2, "validation_loss": 2.75}) + "\n")
    assert plan.optima() == {}, "the best value lies at an end now"
    assert len(read) == len(swept) + 1


@pytest.mark.parametrize(("behind", "seeds"), [(0.031, [1]), (0.029, [1, 2, 3]), (-0.5, [1, 2, 3])])
def test_a_variant_too_far_behind_gets_no_more_seeds(tmp_path: Path, behind: float, seeds: list[int]) -> None:
    plan = plan_of(tmp_path, seeds=[1, 2, 3], **{"give-up": 0.03})
    own, shared = plan.plan()[:2]
    finish(plan, shared, 3.0 + behind)
    assert len(plan.plan()) == 6, "nothing is known of the baseline"
    finish(plan, own, 3.0)
    assert [run.seed for run in plan.plan() if run.variant.name == "shared"] == seeds
    assert [run.seed for run in plan.plan() if run.variant.name == "own"] == [1, 2, 3]
