"""The quickstart from an empty folder, with few steps: every command that it shows, and the page that it leaves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_samoe.cli import quickstart
from megatron_samoe.errors import MegatronSamoeError
from tests.harness.program import REPOSITORY


@pytest.mark.night
def test_the_main_job_runs_from_any_folder(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "megatron_samoe", "quickstart", "--train-iters", "22", "--output-dir", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in quickstart.MODELS:
        assert re.search(rf"\n{name}, validation loss \d\.\d{{4}}: {quickstart.PROMPT}", done.stdout)
    assert "$ torchrun --standalone --nproc-per-node 2 -m megatron_samoe pretrain" in done.stdout
    assert (tmp_path / "out/report.html").stat().st_size > 100_000
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_trainings_say_how_far_they_are_and_how_long_they_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(quickstart, "LOOK_S", 0.05)
    monkeypatch.setattr(quickstart, "SAY_S", 0.0)

    def training(name: str, steps: int) -> list[str]:
        (tmp_path / name).mkdir()
        record = """printf '{"iteration": %s, "lm_loss": 1.5}\\n' $i"""
        loop = f"for i in 10 {steps}; do {record} >> {tmp_path / name}/metrics.jsonl; sleep 0.5; done"
        return ["sh", "-c", loop]

    commands = {name: (training(name, steps), steps) for name, steps in (("one", 40), ("two", 60), ("three", 100))}
    ended: list[str] = []
    quickstart.train_side_by_side(commands, tmp_path, ended.append)
    assert sorted(ended) == sorted(commands) and ended[-1] == "three", "each as soon as it is trained"
    shown = capsys.readouterr().out
    assert re.search(
        r"\n   [1-9]0 of 200 steps, about \d:\d\d:\d\d left: one at step 10, loss 1.500; two at step \d+, ", shown
    )


def test_a_training_that_fails_ends_the_others_and_shows_its_words(tmp_path: Path) -> None:
    commands = {"good": (["sleep", "60"], 1), "bad": (["sh", "-c", "echo why; exit 3"], 1)}
    with pytest.raises(MegatronSamoeError, match="pretraining bad ended with status 3:\nwhy"):
        quickstart.train_side_by_side(commands, tmp_path, lambda name: None)


def test_too_few_steps_are_refused(capsys) -> None:
    assert quickstart.main(["--train-iters", "20"]) == 2
    assert "--train-iters = 20: must be above 20" in capsys.readouterr().err
