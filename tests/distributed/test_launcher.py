"""A torchrun that is killed takes its ranks along."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.harness.program import arguments, iterations, start_command, write_corpus

pytestmark = pytest.mark.distributed


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc and prctl")
def test_ranks_die_with_a_killed_torchrun(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "data" / "corpus")
    args = arguments(
        data_path=corpus, save=tmp_path / "save", expert_model_parallel_size=2, train_iters=100_000, eval_iters=0
    )
    run = start_command(args, tmp_path / "out", num_ranks=2)
    assert run.wait_until(lambda: "iteration        3/" in run.output()), run.output()
    ranks = psutil.Process(run.processes[0].pid).children()
    assert len(ranks) == 2
    run.signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while alive := [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]:
        if time.monotonic() > deadline:
            for rank in alive:
                rank.kill()
            pytest.fail("ranks outlive their launcher")
        time.sleep(0.05)
    assert not iterations(tmp_path / "save"), "nothing was saved on the way"
