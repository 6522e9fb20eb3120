"""A rank that leaves along with others of a job: whose signal it was decides whether its torchrun tries again."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from megatron_samoe.errors import HostsLeftError
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
        signals.agreed = agreed
        timer = threading.Timer(sent_after_s or 0.0, os.kill, (os.getpid(), agreed))
        timer.start() if sent_after_s is not None else None
        try:
            signals.part()
        finally:
            timer.cancel()


def test_a_host_that_was_not_told_tries_again(on_one_of_two_hosts: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostsLeftError, match="SIGTERM came to other hosts alone") as raised:
        part(signal.SIGTERM)
    assert not raised.value.permanent and raised.value.exit_status != 0 and not raised.value.collective
    on_one_of_two_hosts.setenv("LOCAL_RANK", "1")
    with pytest.raises(HostsLeftError) as raised:
        part(signal.SIGTERM)
    assert raised.value.collective, "one line a host"


def test_a_host_that_is_told_later_leaves(on_one_of_two_hosts: pytest.MonkeyPatch) -> None:
    on_one_of_two_hosts.setattr(trainer, "PARTING_S", 60.0)
    part(signal.SIGTERM, sent_after_s=0.1)


def test_other_ways_to_leave_are_for_all_hosts(on_one_of_two_hosts: pytest.MonkeyPatch) -> None:
    part(signal.SIGUSR1)
    on_one_of_two_hosts.setenv("LOCAL_WORLD_SIZE", "4")
    part(signal.SIGTERM)
    on_one_of_two_hosts.setenv("LOCAL_WORLD_SIZE", "2")
    on_one_of_two_hosts.delenv("TORCHELASTIC_RUN_ID")
    part(signal.SIGTERM)
