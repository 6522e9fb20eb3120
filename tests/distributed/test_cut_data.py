"""Data that are cut short under a running job end it with the file's name, on every rank."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.harness.program import arguments, start, write_corpus

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_data_that_are_cut_under_a_job_are_named(suffix: str, tmp_path: Path) -> None:
    corpus = tmp_path / "data" / "corpus"
    args = arguments(data_path=corpus, train_iters=100_000, eval_iters=0, expert_model_parallel_size=2)
    for _ in range(3):
        write_corpus(corpus)
        run = start(args, tmp_path / "out", num_ranks=2)
        assert run.wait_until(lambda run=run: "iteration        3/" in run.output()), run.output()
        os.truncate(f"{corpus}{suffix}", 0)
        if -signal.SIGBUS not in run.wait():
            break  # else the cut fell between a look at the size and the read, where the kernel is first
    assert f"corpus{suffix} was cut short while it was in use" in run.fail()
