"""machine.json: where a run ran, beside its metrics."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_samoe.parallel_state.state import single_process_state
from megatron_samoe.training.hooks.loggers import MetricsFile
from megatron_samoe.training.machine import machine_facts


def run_at(iteration: int) -> Any:
    setup = SimpleNamespace(parallel=single_process_state())
    return SimpleNamespace(setup=setup, state=SimpleNamespace(iteration=iteration))


def test_the_machine_is_written_beside_the_metrics(tmp_path: Path) -> None:
    facts = machine_facts(single_process_state())
    hook = MetricsFile(str(tmp_path / "run" / "metrics.jsonl"))
    hook.start(run_at(0))
    hook.close(run_at(0))
    found = json.loads((tmp_path / "run" / "machine.json").read_text())
    assert found == facts and found["device"] == "cpu" and found["ranks"] == 1 and found["device_name"]
    assert found["layout"] == {"tensor": 1, "context": 1, "pipeline": 1, "expert": 1, "expert_tensor": 1, "data": 1}


def test_an_evaluation_of_a_killed_run_has_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iterat')
    hook = MetricsFile(str(path), trains=False)
    hook.start(run_at(1))
    hook.evaluated(run_at(1), {"iteration": 1, "validation_loss": 2.0})
    hook.close(run_at(1))
    assert path.read_text() == '{"iteration": 1}\n{"iteration": 1, "validation_loss": 2.0}\n'


def test_an_evaluation_alone_leaves_what_training_wrote(tmp_path: Path) -> None:
    (tmp_path / "machine.json").write_text("{}")
    hook = MetricsFile(str(tmp_path / "metrics.jsonl"), trains=False)
    hook.start(run_at(0))
    hook.close(run_at(0))
    assert (tmp_path / "machine.json").read_text() == "{}"
