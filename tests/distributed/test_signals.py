"""Leaving early: signals, --exit-interval, --exit-duration-in-mins. Every way out saves first."""

from __future__ import annotations

import logging.handlers
import re
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_samoe.log import logger
from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.training import trainer
from megatron_samoe.training.hook import Hook, Training
from megatron_samoe.training.setup import build_setup
from tests.harness.program import ProgramRun, arguments, iterations, records, start, start_command
from tests.harness.ranks import run_ranks
from tests.harness.tiny import VOCAB_SIZE, RandomBatches, tiny_config

pytestmark = pytest.mark.distributed

LONG = {"train_iters": 2000, "eval_iters": 0}


def after_third_step(run: ProgramRun) -> ProgramRun:
    """Returns the run once its third iteration is logged."""
    assert run.wait_until(lambda: "iteration        3/" in run.output()), run.output()
    return run


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
    run = after_third_step(begin(arguments(data_path=corpus, save=tmp_path / "save", **LONG), tmp_path / "out"))
    run.signal(number)
    left_at = assert_left_with_checkpoint(run, tmp_path / "save", f"signal {number:d} received")
    assert 3 <= left_at < 30


@pytest.mark.parametrize("rank", [0, 1])
def test_signal_to_one_rank_takes_all_along(rank: int, corpus: Path, tmp_path: Path) -> None:
    args = arguments(data_path=corpus, save=tmp_path / "save", expert_model_parallel_size=2, **LONG)
    run = after_third_step(start(args, tmp_path / "out", num_ranks=2))
    run.signal(signal.SIGUSR1, rank)
    reason = f"signal {signal.SIGUSR1:d} received by rank {rank} ({socket.gethostname()})"
    assert_left_with_checkpoint(run, tmp_path / "save", reason)


def test_signal_without_a_place_to_save_just_leaves(corpus: Path, tmp_path: Path) -> None:
    run = after_third_step(start(arguments(data_path=corpus, **LONG), tmp_path / "out"))
    run.signal(signal.SIGTERM)
    assert "exiting after iteration" in run.succeed()


def test_signal_before_training_ends_at_once(corpus: Path, tmp_path: Path) -> None:
    """While the program only starts there is nothing to save, and the signal's usual effect is right."""
    run = start_command(arguments(data_path=corpus, save=tmp_path / "save", **LONG), tmp_path / "out")
    run.signal(signal.SIGTERM)
    assert run.wait(20) == (-signal.SIGTERM,)
    assert not (tmp_path / "save").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_peer_that_dies_ends_the_others(victim: int, corpus: Path, tmp_path: Path) -> None:
    """No rank waits for ever for one that is gone, and what was saved stays whole."""
    args = arguments(data_path=corpus, run_dir=tmp_path / "run", save_interval=2, **LONG)
    run = after_third_step(start(args, tmp_path / "out", num_ranks=2))
    run.signal(signal.SIGKILL, victim)
    statuses = run.wait(20)
    assert statuses[victim] == -signal.SIGKILL and 0 not in statuses
    last = iterations(tmp_path / "run/checkpoints")[-1]
    again = arguments(data_path=corpus, run_dir=tmp_path / "run", **{**LONG, "train_iters": last + 1})
    start(again, tmp_path / "out").succeed()
    assert [r["iteration"] for r in records(tmp_path / "run/metrics.jsonl")] == list(range(1, last + 2))


def test_exit_interval_stops_where_it_divides(corpus: Path, tmp_path: Path) -> None:
    args = arguments(data_path=corpus, run_dir=tmp_path / "run", exit_interval=4, train_iters=10, eval_iters=0)
    for stop in (4, 8):
        run = start(args, tmp_path / "out")
        assert assert_left_with_checkpoint(run, tmp_path / "run/checkpoints", "--exit-interval 4") == stop
    output = start(args, tmp_path / "out").succeed()
    assert "exiting" not in output
    assert iterations(tmp_path / "run/checkpoints") == [4, 8, 10]
    assert [r["iteration"] for r in records(tmp_path / "run/metrics.jsonl")] == list(range(1, 11))


def _late_by_the_last_clock(folder: str) -> tuple[int, str]:
    """Trains by clocks of which only the last rank's goes on, by a minute a step; returns the iteration and what was said."""
    config = tiny_config("dense", num_layers=1, train_iters=9, exit_duration_in_mins=2.5, save=folder)
    setup = build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel))
    is_last = setup.parallel.rank == setup.parallel.world_size - 1
    data, said = RandomBatches(setup), logging.handlers.BufferingHandler(1000)
    logger.setLevel(logging.INFO)
    logger.addHandler(said)
    trainer.time = SimpleNamespace(monotonic=lambda: 60.0 * data.steps * is_last, sleep=time.sleep)
    state = trainer.Trainer(setup, data, []).run()  # type: ignore[arg-type]
    return state.iteration, " ".join(record.getMessage() for record in said.buffer)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_exit_duration_stops_all_ranks(num_ranks: int, tmp_path: Path) -> None:
    for iteration, said in run_ranks(_late_by_the_last_clock, num_ranks, str(tmp_path)):
        assert iteration == 3 and "exiting after iteration 3: --exit-duration-in-mins 2.5" in said
    assert iterations(tmp_path) == [3]


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


def _until_enough(folder: str) -> tuple[int, list[str]]:
    config = tiny_config("dense", num_layers=1, train_iters=9, save=folder)
    setup = build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel))
    hook = _EnoughHook()
    return trainer.Trainer(setup, RandomBatches(setup), [hook]).run().iteration, hook.told  # type: ignore[arg-type]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_hook_of_one_rank_ends_a_run_on_all(num_ranks: int, tmp_path: Path) -> None:
    found = run_ranks(_until_enough, num_ranks, str(tmp_path))
    assert found == [(2, ["7 at 2", "exited", "closed"])] * num_ranks
    assert iterations(tmp_path) == [2]
