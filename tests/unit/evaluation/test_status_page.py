"""A study's page while it runs: the state of every run, its newest figures, and the losses so far."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_samoe.evaluation.study.definition import read_study
from megatron_samoe.evaluation.study.plan import StudyPlan
from megatron_samoe.evaluation.study.runner import Making, StudyRunner
from megatron_samoe.evaluation.study.status_page import StatusPage
from tests.unit.evaluation.test_study import write_kept, write_study


@pytest.mark.parametrize("evaluated", [True, False])
def test_every_run_has_its_state_and_newest_figures(tmp_path: Path, evaluated: bool) -> None:
    study = read_study(write_study(tmp_path, derived=None, seeds=[1, 2]))
    plan = StudyPlan(study, tmp_path / "runs", ())
    runner, runs = StudyRunner(plan), plan.all_runs()
    for run in runs:
        run.directory.mkdir(parents=True)
    records = [{"iteration": 1000, "lm_loss": 3.25, "tokens_per_s": 1234.5}, {"iteration": 2000, "lm_loss": 3.125}]
    if evaluated:
        records[1]["validation_loss"] = 3.5
    (runs[0].directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if evaluated:
        write_kept(runs[0].directory, plan.config_of(runs[0]))
    plan.failures[runs[1].directory] = "it broke"
    runner.active[runs[2].directory] = Making(runs[2], iter(()))
    StatusPage().write(runner)
    page = (tmp_path / "runs/status.html").read_text()
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)[1:]]
    first = (
        ["finished", "2,000", "3.1250", "3.5000", "1,234"]
        if evaluated
        else ["waiting", "2,000", "3.1250", "-", "1,234"]
    )
    assert rows[0] == ["own experts, seed 1", *first]
    assert [row[1] for row in rows[1:]] == ["failed", "running", "waiting"]
    assert f"{int(evaluated)} of 4 runs finished, 1 running here, 1 failed" in page
    assert ('alt="Validation loss"' in page) == evaluated
    assert 'http-equiv="refresh"' in page and [path.name for path in (tmp_path / "runs").glob("*.*")] == ["status.html"]
