"""Data that are cut short under a running job end it with the file's name, on every rank."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.harness.program import arguments, start, write_corpus

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_data_that_are_cut_under_a_job_are_named(suffix: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "data" / "corpus")
    args = arguments(data_path=corpus, train_iters=100_000, eval_iters=0, expert_model_parallel_size=2)
    run = start(args, tmp_path / "out", num_ranks=2)
    assert run.wait_until(lambda: "iteration        3/" in run.output()), run.output()
    os.truncate(f"{corpus}{suffix}", 0)
    assert f"corpus{suffix} was cut short while it was in use" in run.fail()
