"""Leaving early: signals, --exit-duration-in-mins, which save first; and a launcher, a rank or data that are lost."""

from __future__ import annotations

import logging.handlers
import os
import re
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from megatron_samoe.log import logger
from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.training import trainer
from megatron_samoe.training.hook import Hook, Training
from megatron_samoe.training.setup import build_setup
from tests.harness.program import ProgramRun, arguments, iterations, start, start_command, write_corpus
from tests.harness.ranks import run_ranks
from tests.harness.tiny import VOCAB_SIZE, RandomBatches, tiny_config, with_options

pytestmark = pytest.mark.distributed

LONG = {"train_iters": 2000, "eval_iters": 0}


def assert_left_with_checkpoint(run: ProgramRun, checkpoints: Path, reason: str) -> int:
    """Asserts an orderly exit for a reason, with the last state saved; returns its iteration."""
    output = run.succeed()
    left = re.search(r"exiting after iteration (\d+): (.*)", output)
    assert left is not None and left[2] == reason, output
    assert iterations(checkpoints)[-1] == int(left[1])
    assert "Traceback" not in output
    return int(left[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_and_leaves(number: signal.Signals, corpus: Path, tmp_path: Path) -> None:
    # The first by the true interpreter, with its own start and end, not the fork server's.
    begin = start_command if number == signal.SIGTERM else start
    run = begin(arguments(data_path=corpus, save=tmp_path / "save", **LONG), tmp_path / "out")
    run.wait_for_step(3)
    run.signal(number)
    left_at = assert_left_with_checkpoint(run, tmp_path / "save", f"signal {number:d} received")
    assert 3 <= left_at < 30


@pytest.mark.parametrize("rank", [0, 1])
def test_signal_to_one_rank_takes_all_along(rank: int, corpus: Path, tmp_path: Path) -> None:
    args = arguments(data_path=corpus, save=tmp_path / "save", expert_model_parallel_size=2, **LONG)
    run = start(args, tmp_path / "out", num_ranks=2)
    run.wait_for_step(3)
    run.signal(signal.SIGUSR1, rank)
    reason = f"signal {signal.SIGUSR1:d} received by rank {rank} ({socket.gethostname()})"
    assert_left_with_checkpoint(run, tmp_path / "save", reason)


def test_signal_without_a_place_to_save_just_leaves(corpus: Path, tmp_path: Path) -> None:
    run = start(arguments(data_path=corpus, **LONG), tmp_path / "out")
    run.wait_for_step(3)
    run.signal(signal.SIGTERM)
    assert "exiting after iteration" in run.succeed()


def test_signal_before_training_ends_at_once(corpus: Path, tmp_path: Path) -> None:
    """While the program only starts there is nothing to save, and the signal's usual effect is right."""
    run = start_command(arguments(data_path=corpus, save=tmp_path / "save", **LONG), tmp_path / "out")
    run.signal(signal.SIGTERM)
    assert run.wait(20) == (-signal.SIGTERM,)
    assert not (tmp_path / "save").exists()


class _EnoughHook(Hook):
    """Ends a run by what the last rank alone sees."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def wants_exit(self, run: Training) -> int:
        last = run.setup.parallel.rank == run.setup.parallel.world_size - 1
        return 7 if last and run.state.iteration == 2 else 0

    def exit_reason(self, run: Training, number: int) -> str:
        self.told.append(f"{number} at {run.state.iteration}")
        return "enough"

    def exited(self, run: Training) -> None:
        self.told.append("exited")

    def close(self, run: Training) -> None:
        self.told.append("closed")


def _until(what: str, folder: str) -> tuple[int, list[str]]:
    """Trains until the last rank alone has enough: by its clock, which goes on by a minute a step while others' stand, or by a
    hook; returns the iteration and what was said."""
    config = tiny_config("dense", num_layers=1, train_iters=9, save=folder)
    if what == "late":
        config = with_options(config, exit_duration_in_mins=2.5)
    setup, hook = build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel)), _EnoughHook()
    data, said = RandomBatches(setup), logging.handlers.BufferingHandler(1000)
    logger.setLevel(logging.INFO)
    logger.addHandler(said)
    is_last = setup.parallel.rank == setup.parallel.world_size - 1
    if what == "late":
        trainer.time = SimpleNamespace(monotonic=lambda: 60.0 * data.steps * is_last, sleep=time.sleep)
    state = trainer.Trainer(setup, data, [hook] if what == "enough" else []).run()  # type: ignore[arg-type]
    return state.iteration, [*hook.told, *(record.getMessage() for record in said.buffer)]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_exit_duration_stops_all_ranks(num_ranks: int, tmp_path: Path) -> None:
    for iteration, said in run_ranks(_until, num_ranks, "late", str(tmp_path)):
        assert iteration == 3 and any("exiting after iteration 3: --exit-duration-in-mins 2.5" in line for line in said)
    assert iterations(tmp_path) == [3]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_hook_of_one_rank_ends_a_run_on_all(num_ranks: int, tmp_path: Path) -> None:
    for iteration, said in run_ranks(_until, num_ranks, "enough", str(tmp_path)):
        assert iteration == 2 and said[:3] == ["7 at 2", "exited", "closed"]
    assert iterations(tmp_path) == [2]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc and prctl")
def test_ranks_die_with_a_killed_torchrun(corpus: Path, tmp_path: Path) -> None:
    args = arguments(data_path=corpus, save=tmp_path / "save", expert_model_parallel_size=2, **LONG)
    run = start_command(args, tmp_path / "out", num_ranks=2)
    run.wait_for_step(3)
    ranks = psutil.Process(run.processes[0].pid).children()
    assert len(ranks) == 2
    run.signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, timeout=20)
    for rank in alive:
        rank.kill()
    assert not alive, "ranks outlive their launcher"
    assert not iterations(tmp_path / "save"), "nothing was saved on the way"


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_data_that_are_cut_under_a_job_are_named(suffix: str, tmp_path: Path) -> None:
    corpus = tmp_path / "data" / "corpus"
    args = arguments(data_path=corpus, expert_model_parallel_size=2, **{**LONG, "train_iters": 100_000})
    for _ in range(3):
        write_corpus(corpus)
        run = start(args, tmp_path / "out", num_ranks=2)
        run.wait_for_step(3)
        os.truncate(f"{corpus}{suffix}", 0)
        if -signal.SIGBUS not in run.wait():
            break  # else the cut fell between a look at the size and the read, where the kernel is first
    assert f"corpus{suffix} was cut short while it was in use" in run.fail()
