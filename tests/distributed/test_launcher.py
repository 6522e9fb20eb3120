"""A torchrun that is killed takes its ranks along."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.harness.program import arguments, iterations, start_command, write_corpus

pytestmark = pytest.mark.distributed


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # ended while we looked
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc and prctl")
def test_ranks_die_with_a_killed_torchrun(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "data" / "corpus")
    args = arguments(
        data_path=corpus, save=tmp_path / "save", expert_model_parallel_size=2, train_iters=100_000, eval_iters=0
    )
    run = start_command(args, tmp_path / "out", num_ranks=2)
    assert run.wait_until(lambda: "iteration        3/" in run.output()), run.output()
    ranks = children(run.processes[0].pid)
    assert len(ranks) == 2
    os.kill(run.processes[0].pid, signal.SIGKILL)
    try:
        deadline = time.monotonic() + 20
        while any(is_running(pid) for pid in ranks):
            assert time.monotonic() < deadline, "ranks outlive their launcher"
            time.sleep(0.05)
    finally:
        for pid in ranks:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
    assert not iterations(tmp_path / "save"), "nothing was saved on the way"
