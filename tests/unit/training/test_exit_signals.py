"""A rank that leaves along with others of a job: whose signal it was decides whether its torchrun tries again."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from megatron_samoe.cli import pretrain as cli_pretrain
from megatron_samoe.errors import (
    ConfigError,
    HostDiffersError,
    HostRefusedError,
    HostsLeftError,
    MegatronSamoeError,
    ToldToLeaveError,
)
from megatron_samoe.training import trainer
from megatron_samoe.training.trainer import ExitSignals


@pytest.fixture
def on_one_of_two_hosts(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in {"TORCHELASTIC_RUN_ID": "7", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(trainer, "PARTING_S", 0.2)
    return monkeypatch


def part(agreed: signal.Signals, sent_after_s: float | None = None) -> None:
    with ExitSignals() as signals:
        signals.agreed, signals.told = agreed, [f"rank {rank} (host1)" for rank in (2, 3)]
        timer = threading.Timer(sent_after_s or 0.0, os.kill, (os.getpid(), agreed))
        timer.start() if sent_after_s is not None else None
        try:
            signals.part()
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
    on_one_of_two_hosts.setattr(trainer, "PARTING_S", 60.0)
    with pytest.raises(ToldToLeaveError, match=r"rank 2 \(host1\), .*: all ranks have saved") as raised:
        part(signal.SIGTERM, sent_after_s)
    assert raised.value.exit_status == 143 and not raised.value.permanent


def test_a_message_names_a_few_ranks() -> None:
    signals = ExitSignals()
    signals.told = [f"rank {rank} (host1)" for rank in range(4)]
    assert signals.who.endswith("rank 3 (host1)")
    signals.told = [f"rank {rank} (host1)" for rank in range(60)]
    assert signals.who.endswith("rank 3 (host1) and 56 others")


def test_other_ways_to_leave_are_for_all_hosts(on_one_of_two_hosts: pytest.MonkeyPatch) -> None:
    part(signal.SIGUSR1)
    on_one_of_two_hosts.setenv("LOCAL_WORLD_SIZE", "4")
    part(signal.SIGTERM)
    on_one_of_two_hosts.setenv("LOCAL_WORLD_SIZE", "2")
    on_one_of_two_hosts.delenv("TORCHELASTIC_RUN_ID")
    part(signal.SIGTERM)


@pytest.mark.parametrize(
    ("error", "rank", "local_rank", "waits"),
    [
        (ConfigError("--lr", 1, "must be less"), 0, 0, False),
        (ConfigError("--lr", 1, "must be less"), 2, 0, True),
        (HostDiffersError([ConfigError("--lr", 1, "must be alike")]), 2, 0, False),
        (HostDiffersError([ConfigError("--lr", 1, "must be alike")]), 3, 1, True),
        (HostRefusedError("host2 cannot take part"), 0, 0, True),
    ],
)
def test_who_leaves_first_is_seen_and_is_a_host_that_the_job_goes_on_without(
    error: MegatronSamoeError, rank: int, local_rank: int, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others' torchruns begin anew with all hosts that are there then."""

    def meet_it(*_: object, **__: object) -> None:
        raise error

    slept: list[float] = []
    monkeypatch.setattr(cli_pretrain, "configure_logging", lambda rank: None)  # which other tests would inherit
    monkeypatch.setattr(cli_pretrain, "parse_pretrain_args", meet_it)
    monkeypatch.setattr(cli_pretrain.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert cli_pretrain.main([]) != 0
    assert bool(slept) == waits
