"""What a run says of itself when something goes wrong or slowly: hangs, spikes, stragglers, preflight, profiles, trackers; and what
two ranks measure of a machine."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import time
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.config import ParallelConfig
from megatron_samoe.config.training import TrainingConfig
from megatron_samoe.errors import ConfigError
from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.row_exchange.all_to_all import all_to_all_rows
from megatron_samoe.runtime.ranks import state_in_layout
from megatron_samoe.training import preflight
from megatron_samoe.training.hang_watch import HangWatch
from megatron_samoe.training.hook import Hook, Record, Training
from megatron_samoe.training.hooks import loggers
from megatron_samoe.training.machine_speed import _Clock, measure
from megatron_samoe.training.setup import build_setup
from megatron_samoe.training.state import SpikeHistory
from megatron_samoe.training.trainer import Trainer
from tests.harness.program import arguments, records, start
from tests.harness.ranks import run_ranks
from tests.harness.tiny import VOCAB_SIZE, RandomBatches, tiny_config

pytestmark = pytest.mark.distributed


@pytest.mark.night  # it waits for a time-out
def test_a_hang_leaves_stacks_and_collectives(corpus: Path, tmp_path: Path) -> None:
    args = arguments(
        data_path=corpus, run_dir=tmp_path / "run", train_iters=100_000, eval_iters=0, distributed_timeout_minutes=0.1
    )
    run = start(args, tmp_path / "out", 2)
    run.wait_for_step(3)
    stopped = run.processes[1].pid
    os.kill(stopped, signal.SIGSTOP)
    try:
        assert run.wait_until(lambda: "What each rank was doing" in run.output()), run.output()
    finally:
        with suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGCONT)
    assert 0 not in run.wait(60)
    assert f"What each rank was doing is in {tmp_path / 'run/hangs'}." in run.output()
    left = (tmp_path / "run/hangs/rank-00000.txt").read_text()
    assert left.startswith("rank 0, process ")
    assert "Timeout (0:00:05" in left and "trainer.py" in left, "the stacks before the time-out"
    assert "while computing iteration" in left and "last collectives, the newest last:\n  gloo:" in left


def test_a_watch_without_a_hang_leaves_nothing(tmp_path: Path) -> None:
    with HangWatch(tmp_path / "hangs", 0, 60.0) as watch:
        watch.begin("computing")
        assert watch.path.exists()
    assert not (tmp_path / "hangs").exists()
    with HangWatch(None, 0, 60.0) as watch:
        watch.begin("computing")
        assert watch.lost_others("gone") == ""


def test_a_watch_writes_before_the_time_out(tmp_path: Path) -> None:
    with HangWatch(tmp_path / "hangs", 3, 0.3) as watch:
        watch.begin("computing")
        time.sleep(0.6)
    text = (tmp_path / "hangs/rank-00003.txt").read_text()
    assert "test_a_watch_writes_before_the_time_out" in text
    (after,) = re.findall(r"Timeout \(0:00:(\d+\.\d+)\)!", text)
    assert 0.15 < float(after) < 0.3, "late enough for what is slow, and before others give up on the rank"


HISTORY = TrainingConfig(spike_window=4, spike_sigmas=3.0)


@pytest.mark.parametrize(
    ("loss", "norm", "problem"),
    [
        (4.0, 1.0, None),
        (4.7, 1.0, "loss 4.7 is far above the mean 4.15"),
        (4.0, 30.0, "gradient norm 30 is far above"),
        (1.0, 0.0, None),
    ],
)
def test_spikes_are_far_above_a_window(loss: float, norm: float, problem: str | None) -> None:
    history = SpikeHistory()
    for step in range(4):
        assert history.problem(100.0, 100.0, HISTORY) is None, "too little is known"
        history = history.after(4.3 - 0.1 * step, 1.0 + 0.1 * step, HISTORY)
    found = history.problem(loss, norm, HISTORY)
    assert (found or "").startswith(problem or "") and (found is None) == (problem is None)
    assert SpikeHistory.from_plain(json.loads(json.dumps(asdict(history)))) == history
    assert len(history.after(5.0, 1.0, HISTORY).losses) == 4
    assert history.problem(100.0, 100.0, TrainingConfig()) is None
    assert SpikeHistory.from_plain({"losses": ["x"], "norms": [1.0]}) == SpikeHistory()


def test_spikes_are_reported_skipped_and_resumed(corpus: Path, tmp_path: Path) -> None:
    """With a threshold of almost nothing about half of all steps are spikes."""
    spikes_of = {"spike_window": 3, "spike_sigmas": 1e-3, "skip_spikes": True}
    options = {"data_path": corpus, "train_iters": 12, "eval_iters": 0, **spikes_of}
    output = start(arguments(run_dir=tmp_path / "whole", **options), tmp_path).succeed()
    whole = records(tmp_path / "whole/metrics.jsonl")
    spikes = [r["iteration"] for r in whole if r["spike"]]
    assert 2 <= len(spikes) <= 9 and min(spikes) > 3
    assert [r["iteration"] for r in whole if r["skipped"]] == spikes
    first = spikes[0]
    assert f"iteration {first}: " in output and "the step was skipped" in output
    assert f"samples {8 * (first - 1)} to {8 * first - 1} of the training data" in output
    start(arguments(run_dir=tmp_path / "parts", exit_interval=6, **options), tmp_path).succeed()
    start(arguments(run_dir=tmp_path / "parts", **options), tmp_path).succeed()
    parts = records(tmp_path / "parts/metrics.jsonl")
    assert [(r["lm_loss"], r["spike"]) for r in parts] == [(r["lm_loss"], r["spike"]) for r in whole]


class Late(Hook):
    """Makes the steps of one rank 0.4 seconds longer, and keeps what was recorded."""

    def __init__(self, rank: int) -> None:
        self.rank, self.records = rank, list[Record]()

    def wants_gradients(self, run: Training) -> bool:
        return True

    def backward_done(self, run: Training) -> None:
        time.sleep(0.4 * (run.setup.parallel.rank == self.rank))

    def record(self, run: Training, record: Record) -> None:
        self.records.append(record)


def _second_record(late_rank: int) -> Record:
    """Returns the record of a step that is not the first, in which much is made ready."""
    config = tiny_config("samoe", num_layers=1, train_iters=2, log_interval=1, expert_model_parallel_size=2)
    setup = build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel))
    hook = Late(late_rank)
    ballast = b"1" * (setup.parallel.rank != late_rank) * (64 << 20)  # who has most memory is another one
    Trainer(setup, RandomBatches(setup), [hook]).run()  # type: ignore[arg-type]
    del ballast
    return hook.records[1]


@pytest.mark.parametrize("late_rank", [0, 1])
def test_the_slowest_rank_is_named(late_rank: int) -> None:
    of_ranks = run_ranks(_second_record, 2, late_rank)
    for record in of_ranks:
        assert record["slowest_rank"] == late_rank
        assert 0.4 <= record["own_time_max_s"] <= of_ranks[late_rank]["step_time_s"]
        assert 0.2 <= record["own_time_mean_s"] < record["own_time_max_s"], "the other one waits"


def test_the_console_tells_times_and_ways(corpus: Path, tmp_path: Path) -> None:
    args = arguments(data_path=corpus, train_iters=4, eval_iters=0, expert_model_parallel_size=2)
    output = start(args, tmp_path, num_ranks=2).succeed()
    assert "own time per rank (ms): " in output and "time left: 0:00:0" in output and "epoch: " in output
    assert "tokens travel through shared memory" in output and "pipeline 1" in output and "over gloo" in output


def _waited(late_rank: int) -> tuple[float, float]:
    """Returns for how long a rank waited for tokens, and in a sum over ranks, to which one comes late."""
    parallel = initialize_model_parallel(ParallelConfig(expert_model_parallel_size=2))
    rows, waits = torch.ones(2, 4), [parallel.world.waits.seconds]
    for exchange in (lambda: all_to_all_rows(rows, [1, 1], [1, 1], parallel.ep), lambda: parallel.dp.all_reduce(rows)):
        dist.barrier()
        time.sleep(0.5 if parallel.rank == late_rank else 0.0)
        exchange()
        waits.append(parallel.world.waits.seconds)
    return waits[1] - waits[0], waits[2] - waits[1]


@pytest.mark.parametrize("late_rank", [0, 1])
def test_who_waits_is_not_the_slow_one(late_rank: int) -> None:
    of_ranks = run_ranks(_waited, 2, late_rank)
    for late_s, other_s in zip(of_ranks[late_rank], of_ranks[1 - late_rank], strict=True):
        assert late_s < 0.2 and other_s > late_s + 0.3


def _preflight(available: int, ahead_s: float = 0.0) -> list[str] | str:
    parallel = initialize_model_parallel(ParallelConfig(expert_model_parallel_size=2))
    preflight.free_memory_bytes = lambda device: available
    clock = time.time
    preflight.time = SimpleNamespace(time=lambda: clock() + ahead_s * parallel.rank, perf_counter=time.perf_counter)
    try:
        return preflight.preflight(tiny_config("samoe", expert_model_parallel_size=2), 64, parallel)
    except ConfigError as error:
        return str(error)


def test_preflight_refuses_too_little_memory() -> None:
    for found in run_ranks(_preflight, 2, 1000):
        assert "2 ranks of" in found and found.count("B left") == 1
    assert preflight.free_memory_bytes(torch.device("cpu")) > 0


@pytest.mark.parametrize("ahead_s", [1.0, 6.0])
def test_preflight_names_clocks_that_differ(ahead_s: float) -> None:
    """Of two ranks by half."""
    named = [f"the clock of rank {rank} is {off} s off the others'" for rank, off in enumerate(("-3.0", "+3.0"))]
    for warnings in run_ranks(_preflight, 2, 1 << 40, ahead_s):
        assert [said for said in warnings if "clock" in said] == (named if ahead_s > 2 else [])


def test_preflight_names_what_is_slow() -> None:
    assert preflight._slow([1e10, 9e9, 3e9], ["a", "b", "rank 2"], "FLOP/s") == [
        "rank 2 has 3 GFLOP/s, the median is 9 GFLOP/s"
    ]
    assert preflight._slow([1e7, 5e2], ["a", "b"], "B/s") == ["b has 500 B/s, the median is 10 MB/s"]


def test_preflight_of_a_run(corpus: Path, tmp_path: Path) -> None:
    fast = dict.fromkeys(("flops", "memory_bandwidth", "intra_bandwidth", "inter_bandwidth"), 1e18)
    (tmp_path / "machine.json").write_text(json.dumps({**fast, "memory_bytes": 1e9, "efficiency": 1, "latency_s": 0}))
    preflights = {"preflight": True, "preflight_calibration": tmp_path / "machine.json"}
    args = arguments(data_path=corpus, train_iters=1, eval_iters=0, expert_model_parallel_size=2, **preflights)
    output = start(args, tmp_path, num_ranks=2).succeed()
    for words in ("ranks of", "FLOP/s per rank", "B/s in ep groups", "B/s in dp groups"):
        assert words in output
    assert "calibration found 1e+06 TFLOP/s" in output and "the ep group of ranks [0, 1] has" in output
    assert "no --save and no --run-dir: the model is gone" in output


def test_a_profile_has_the_parts_of_a_step(corpus: Path, tmp_path: Path) -> None:
    profiled = {"profile": True, "profile_step_start": 2, "profile_step_end": 4, "profile_ranks": [1]}
    args = arguments(data_path=corpus, run_dir=tmp_path / "run", train_iters=6, eval_iters=0, **profiled)
    start(args, tmp_path, num_ranks=2).succeed()
    assert [path.name for path in tmp_path.glob("run/profile/*")] == ["rank-00001.json.gz"]
    with gzip.open(tmp_path / "run/profile/rank-00001.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"iteration 2", "iteration 3", "forward and backward", "reduce gradients", "optimizer"} <= names
    assert not {"iteration 1", "iteration 4"} & names


RECORD = {
    "iteration": 3,
    "lm_loss": 4.5,
    "skipped": False,
    "validation_loss_by_dataset": {"a": 1.5},
    "expert_load": [[1]],
}


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_trackers_log_numbers_and_losses_by_dataset_without_a_network(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    module = pytest.importorskip(library, reason=f"the extra {library} is not installed")
    tracker = loggers.Tracker(library, "samoe-test", "a run", {"model": {"num_layers": 2}})
    run: Any = None
    tracker.start(run)
    with mock.patch.object(module, "log", wraps=module.log) as log:
        tracker.record(run, RECORD)
    tracker.close(run)
    log.assert_called_once_with({"lm_loss": 4.5, "skipped": 0.0, "validation_loss/a": 1.5}, step=3)
    assert any(path.is_file() and path.stat().st_size for path in tmp_path.rglob("*")), "nothing was kept"


def test_a_tracker_that_is_not_installed_says_how_it_would_be() -> None:
    with pytest.raises(ConfigError, match=r"--nonesuch-project = 'p': needs nonesuch, .*\[nonesuch\]"):
        loggers.Tracker("nonesuch", "p", None, {})


LATE_S, EXCHANGE_S = 0.2, 0.02


def measured() -> tuple[dict[str, Any], float, float]:
    """Returns the figures, the seconds of an exchange to which the second rank comes late, and those of two groups of one rank,
    of which the second is slower.
    """
    parallel = state_in_layout(ParallelConfig(tensor_model_parallel_size=2), torch.device("cpu"))

    def exchange() -> None:
        parallel.world.barrier()
        time.sleep(EXCHANGE_S)

    clock = _Clock(parallel, rounds=1)
    waits = partial(time.sleep, LATE_S * parallel.rank)
    late, twice = clock.exchange_seconds(parallel.world, [exchange, lambda: (exchange(), exchange())], waits)
    (slower,) = clock.exchange_seconds(parallel.ep, [partial(time.sleep, EXCHANGE_S * parallel.rank)], lambda: None)
    assert 2 * EXCHANGE_S <= twice < LATE_S / 2
    return measure(parallel, rounds=1, scale=1 / 16), late, slower


def test_ranks_agree_on_their_links_and_count_the_slowest_group_but_not_who_comes_late() -> None:
    (first, late, slower), (second, *_) = run_ranks(measured, 2, more=("megatron_samoe.training.machine_speed",))
    links = ("intra_bandwidth", "inter_bandwidth", "latency_s", "sharded_exchange", "expert_exposed")
    assert [first[name] for name in links] == [second[name] for name in links]
    assert first["intra_bandwidth"] > 1e6 and first["latency_s"] >= 0 and first["gpus_per_node"] == 2
    assert min(first["sharded_exchange"], first["expert_exposed"]) > 0
    assert EXCHANGE_S <= late < LATE_S / 2 and slower >= EXCHANGE_S
