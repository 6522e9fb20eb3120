"""The quickstart from an empty folder, with few steps: every command that it shows, and the page that it leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_samoe.cli import quickstart
from tests.harness.program import REPOSITORY


@pytest.mark.night
def test_the_main_job_runs_from_any_folder(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "megatron_samoe", "quickstart", "--train-iters", "22", "--output-dir", "out"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for name in quickstart.MODELS:
        assert f"\n{name}: {quickstart.PROMPT}" in done.stdout
    assert "$ torchrun --standalone --nproc-per-node 2 -m megatron_samoe pretrain" in done.stdout
    assert (tmp_path / "out/report.html").stat().st_size > 100_000
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_too_few_steps_are_refused(capsys) -> None:
    assert quickstart.main(["--train-iters", "20"]) == 2
    assert "--train-iters = 20: must be above 20" in capsys.readouterr().err
