"""A rank that leaves along with others of a job: whose signal it was decides whether its torchrun tries again."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from megatron_samoe.cli import pretrain as cli_pretrain
from megatron_samoe.errors import (
    CheckpointError,
    CommunicationError,
    ConfigError,
    ConfigErrors,
    DataError,
    ExtensionError,
    HostDiffersError,
    HostRefusedError,
    HostsLeftError,
    JobEndedError,
    MegatronSamoeError,
    NonFiniteLossError,
    ReplicaDriftError,
    ToldToLeaveError,
)
from megatron_samoe.parallel_state import launcher
from megatron_samoe.training.hooks import exit_signals
from megatron_samoe.training.hooks.exit_signals import ExitSignals
from tests.harness.tiny import tiny_config

#: What the hook sees of a run that saves nothing.
RUN: Any = SimpleNamespace(setup=SimpleNamespace(config=tiny_config("dense")))


@pytest.fixture
def on_one_of_two_hosts(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in {"TORCHELASTIC_RUN_ID": "7", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(exit_signals, "PARTING_S", 0.2)
    return monkeypatch


def part(agreed: signal.Signals, sent_after_s: float | None = None) -> None:
    signals = ExitSignals()
    with signals.around(RUN):
        signals.agreed, signals.notified_ranks = agreed, [f"rank {rank} (host1)" for rank in (2, 3)]
        timer = threading.Timer(sent_after_s or 0.0, os.kill, (os.getpid(), agreed))
        timer.start() if sent_after_s is not None else None
        try:
            signals.exited(RUN)
        finally:
            timer.cancel()


def test_a_host_that_was_not_told_tries_again(on_one_of_two_hosts: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostsLeftError, match=r"SIGTERM came to rank 2 \(host1\), rank 3 \(host1\) and not") as raised:
        part(signal.SIGTERM)
    assert not raised.value.permanent and raised.value.exit_status != 0 and not raised.value.collective
    on_one_of_two_hosts.setenv("LOCAL_RANK", "1")
    with pytest.raises(HostsLeftError) as raised:
        part(signal.SIGTERM)
    assert raised.value.collective, "one line a host"


@pytest.mark.parametrize("sent_after_s", [0.0, 0.1])
def test_a_rank_that_is_told_leaves_as_one_that_is_not_done(
    sent_after_s: float, on_one_of_two_hosts: pytest.MonkeyPatch
) -> None:
    """Its torchrun would wait for the other hosts' ends and train no more, where it has not sent the signal itself."""
    on_one_of_two_hosts.setattr(exit_signals, "PARTING_S", 60.0)
    with pytest.raises(ToldToLeaveError, match=r"rank 2 \(host1\), .*: all ranks leave. Nothing was saved") as raised:
        part(signal.SIGTERM, sent_after_s)
    assert raised.value.exit_status == 143 and not raised.value.permanent


def test_a_message_names_a_few_ranks() -> None:
    signals = ExitSignals()
    signals.notified_ranks = [f"rank {rank} (host1)" for rank in range(4)]
    assert signals.who.endswith("rank 3 (host1)")
    signals.notified_ranks = [f"rank {rank} (host1)" for rank in range(60)]
    assert signals.who.endswith("rank 3 (host1) and 56 others")


def test_a_thread_of_a_program_leaves_the_signals_to_it() -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def look() -> None:
        with ExitSignals().around(RUN):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [before]
    with ExitSignals().around(RUN):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_ways_to_leave_are_for_all_hosts(on_one_of_two_hosts: pytest.MonkeyPatch) -> None:
    part(signal.SIGUSR1)
    on_one_of_two_hosts.setenv("LOCAL_WORLD_SIZE", "4")
    part(signal.SIGTERM)
    on_one_of_two_hosts.setenv("LOCAL_WORLD_SIZE", "2")
    on_one_of_two_hosts.delenv("TORCHELASTIC_RUN_ID")
    part(signal.SIGTERM)


def let_meet(error: MegatronSamoeError, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the command's training meet an error."""

    monkeypatch.setattr(cli_pretrain, "configure_logging", lambda rank: None)  # which other tests would inherit
    monkeypatch.setattr(cli_pretrain, "resolve", Mock(side_effect=error))


ALIKE = ConfigErrors([ConfigError("--lr", 1, "must be equal on all hosts")])
DIFFERS = HostDiffersError([ConfigError("--lr", 1, "must be alike")])


@pytest.mark.parametrize(
    ("error", "rank", "local_rank", "course"),
    [
        (ALIKE, 0, 0, ["says", "waits", "leaves"]),
        (ALIKE, 2, 0, ["says", "waits", "leaves"]),
        (ALIKE, 1, 1, ["waits", "waits", "leaves"]),
        (CheckpointError("it is damaged", collective=True), 2, 0, ["says", "waits", "leaves"]),
        (JobEndedError("rank 1 ended it"), 0, 0, ["says", "waits", "leaves"]),
        (CommunicationError("rank 1 is gone"), 0, 0, ["says", "leaves"]),
        (DIFFERS, 2, 0, ["says", "leaves"]),
        (DIFFERS, 3, 1, ["waits", "leaves"]),
        (HostRefusedError("host2 cannot take part"), 0, 0, ["waits", "says", "leaves"]),
    ],
)
def test_every_host_says_what_all_meet_before_any_launcher_may_end(
    error: MegatronSamoeError, rank: int, local_rank: int, course: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher may hold the store without which others end. A host that the job goes on without leaves first: the others'
    torchruns begin anew with all hosts that are there then.
    """

    seen: list[str] = []
    output = SimpleNamespace(write=lambda text: seen.extend(["says"] * text.startswith("error")), flush=lambda: None)
    let_meet(error, monkeypatch)
    monkeypatch.setattr(cli_pretrain.time, "sleep", lambda _: seen.append("waits"))
    monkeypatch.setattr(sys, "stderr", output)
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank), ("LOCAL_WORLD_SIZE", 2), ("WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    assert cli_pretrain.main([]) != 0
    assert [*seen, "leaves"] == course


@pytest.mark.parametrize(
    ("error", "can_pass"),
    [
        (ALIKE, False),
        (DIFFERS, False),
        (DataError("the corpus is damaged"), False),
        (NonFiniteLossError("the loss is nan"), False),
        (ReplicaDriftError("ranks differ"), False),
        (JobEndedError("rank 1 ended it"), False),
        (ExtensionError("it is not built"), False),
        (CheckpointError("it is damaged"), True),
        (CommunicationError("rank 1 is gone"), True),
        (HostsLeftError("host1 left"), True),
        (ToldToLeaveError("all ranks leave"), True),
        (HostRefusedError("host2 cannot take part"), True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_a_launcher_tries_again_where_a_fault_can_pass(
    error: MegatronSamoeError, can_pass: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[tuple[int, int]] = []
    let_meet(error, monkeypatch)
    monkeypatch.setattr(launcher.os, "kill", lambda *signal_of: sent.append(signal_of))
    monkeypatch.setattr(cli_pretrain, "SPEAKING_S", 0.0)
    for name, value in {"TORCHELASTIC_RUN_ID": "7", "TORCHELASTIC_MAX_RESTARTS": "3", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli_pretrain.main([]) != 0
    assert sent == ([] if can_pass else [(os.getppid(), signal.SIGTERM)])
    assert ("not to try again" in capsys.readouterr().err) != can_pass
