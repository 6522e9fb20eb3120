"""Joining other ranks: what a launcher left out, or another job has taken, is said."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.config import ParallelConfig
from megatron_samoe.errors import CommunicationError, ConfigError
from megatron_samoe.parallel_state import backend, initialize_model_parallel, launcher
from megatron_samoe.parallel_state.meeting import Meeting
from megatron_samoe.parallel_state.rank_store import join_store, serve_store
from tests.harness.op_checks import threads_of_torch
from tests.harness.ranks import run_ranks
from tests.harness.tables import table
from tests.harness.tiny import started, steps, tiny_config, with_layout

TABLE = table(__file__)


def join() -> None:
    backend.initialize_distributed(ParallelConfig(distributed_timeout_minutes=0.05), torch.device("cpu"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def first_of_two(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return monkeypatch


def test_a_missing_variable_is_named(first_of_two: pytest.MonkeyPatch) -> None:
    first_of_two.delenv("MASTER_ADDR")
    with pytest.raises(CommunicationError, match=r"Rank 0 of 2 could not join the others at .*MASTER_ADDR expected"):
        join()


def test_a_port_that_another_job_has_is_named(first_of_two: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        port = taken.getsockname()[1]
        first_of_two.setenv("MASTER_PORT", str(port))
        with pytest.raises(CommunicationError, match=f"at 127.0.0.1:{port}: .*(EADDRINUSE|in use)"):
            join()


@pytest.mark.parametrize("lives", [False, True])
def test_a_rank_that_is_lost_before_gloo_connects_is_named_and_not_waited_for(
    lives: bool, first_of_two: pytest.MonkeyPatch
) -> None:
    """Another rank meets this one and is never heard of again, as after a loss of power; or it lives, and gloo has no way to it."""
    port = free_port()
    first_of_two.setenv("MASTER_PORT", str(port))
    first_of_two.setattr(backend, "connecting_time", lambda size, timeout: timedelta(seconds=1))
    first_of_two.setattr(backend, "TELLING_S", 0.5)

    def other() -> None:
        meeting = Meeting(dist.TCPStore("127.0.0.1", port, 2, timeout=timedelta(seconds=10)), 1, 2)
        meeting.join(10.0)
        meeting.compare({})
        if lives:
            meeting.compare_problems("no route", 2, 5.0)

    thread = threading.Thread(target=other)
    thread.start()
    began = time.monotonic()
    said = (
        r"gloo could not connect them: rank \d \(.*\): .*GLOO_SOCKET_IFNAME"
        if lives
        else rf"lost rank 1 \({socket.gethostname()}\) before"
    )
    with pytest.raises(CommunicationError, match=f"Rank 0 of 2 reached the others, .*{said}") as caught:
        backend.initialize_distributed(ParallelConfig(distributed_timeout_minutes=10), torch.device("cpu"), 2, {})
    thread.join(10)
    assert time.monotonic() - began < 10 and ("SOCKET_IFNAME" in str(caught.value)) == lives


@pytest.mark.parametrize("name", launcher.FOREIGN_WORLD_SIZES)
def test_ranks_of_another_launcher_do_not_train_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, "1")
    assert launcher.world_size() == 1
    monkeypatch.setenv(name, "4")
    with pytest.raises(ConfigError, match=f"{name} = 4: .*torchrun"):
        launcher.world_size()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launcher.world_size() == 4


@pytest.mark.parametrize(("environment", "asked", "threads"), TABLE["threads"])
def test_threads_are_those_that_somebody_chose(
    environment: dict[str, str], asked: int | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(backend.os, "sched_getaffinity", lambda _: set(range(6)))
    with threads_of_torch(2):  # what it sets is undone
        assert backend.set_num_threads(asked) == threads == torch.get_num_threads()


def test_torchrun_that_is_process_1_of_a_container_is_told_not_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setattr(sys, "platform", "linux")
    launcher.stop_torchrun_restarts()
    assert sent == [(1, signal.SIGTERM)]
    monkeypatch.setattr(sys, "platform", "darwin")  # where ranks outlive a torchrun that was killed
    launcher.stop_torchrun_restarts()
    assert len(sent) == 1


def test_a_host_is_a_member_once_its_torchrun_has_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(agent: str, attempt: int, local_rank: int) -> None:
        """Sets what torchrun sets, and empties the attempt's folder as it does."""
        folder = tmp_path / agent / f"attempt_{attempt}"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / str(local_rank)).mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / str(local_rank) / "error.json"))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))

    start("job_a", 0, local_rank=1)
    launcher.become_member()
    assert not launcher.is_member(), "the first rank of a host notes it"
    start("job_a", 0, local_rank=0)
    launcher.become_member()
    for attempt in (0, 1):  # hosts that come are no failure, after which torchrun counts on
        start("job_a", attempt, local_rank=1)
        assert launcher.is_member()
    start("job_b", 0, local_rank=0)
    assert not launcher.is_member(), "another torchrun"
    for without in ("", "error.json"):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", without)
        launcher.become_member()
        assert not launcher.is_member()


def test_the_ranks_store_listens_at_its_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    store, rank = join_store(timedelta(seconds=10))
    store.set("key", "value")
    assert rank == 0 and store.get("key") == b"value"
    if sys.platform == "linux":
        tables = "".join(Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6"))
        assert re.findall(rf"(\w+):{port:04X} \w+:\w+ 0A", tables) == ["0100007F"]
    with pytest.raises(OSError, match="in use"):
        serve_store("127.0.0.1", port)
    with pytest.raises(OSError):
        serve_store("192.0.2.77", port)


def train_a_step() -> None:
    config = with_layout(tiny_config("dense"), zero=True)
    list(steps(*started(config, parallel=initialize_model_parallel(config.parallel)), 1))


def threads_at_the_end() -> list[str]:
    """Lets everything go after a step, ends the process groups, and returns gloo's threads that are left."""
    train_a_step()
    backend.leave_distributed()
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_no_thread_of_the_process_groups_meets_the_end_of_the_interpreter() -> None:
    """One that then wants the interpreter's lock aborts the process: a job that succeeded ends in SIGABRT."""
    assert run_ranks(threads_at_the_end, 2) == [[], []]
