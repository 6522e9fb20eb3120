"""What a program does before torch is loaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


PROGRAMS = ("-m megatron_samoe pretrain", "-m megatron_samoe.cli.pretrain", "tools/evaluate.py")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc and prctl")
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_rank_dies_with_a_torchrun_that_is_killed_while_torch_is_loaded(program: str, tmp_path: Path) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text(
        f"import os, pathlib, time\npathlib.Path({str(tmp_path / 'loading')!r}).touch()\ntime.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}
    # A shell stands for torchrun: a parent that waits for its rank.
    command = f"{sys.executable} {program} --mock-data 2>/dev/null & echo $!; wait"
    launcher = subprocess.Popen(["sh", "-c", command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "loading").exists():
            assert launcher.poll() is None and time.monotonic() < deadline, "the rank did not come to load torch"
            time.sleep(0.01)
        launcher.kill()
        while is_running(rank):
            assert time.monotonic() < deadline, "a rank outlives its launcher"
            time.sleep(0.01)
    finally:
        launcher.kill()
        launcher.wait()
        if is_running(rank):
            os.kill(rank, signal.SIGKILL)
