"""What torch, gloo and NCCL say of a rank that is gone is known as that, and nothing else is; hosts that do not acknowledge what they
are sent are found in Linux's table of sockets."""

from __future__ import annotations

import mmap
import re
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.parallel_state.backend import UNTYPED_FAILURES, is_communication_failure
from megatron_samoe.parallel_state.silent_hosts import own_address, silent_hosts, unanswered
from tests.harness.tables import table

pytestmark = pytest.mark.distributed

MESSAGES: dict[str, tuple[str, ...]] = table(__file__)


def test_a_failure_of_communication_is_known_and_another_error_is_none() -> None:
    for kind, messages in MESSAGES.items():
        for message in messages:
            assert is_communication_failure(RuntimeError(message)) == (kind == "said"), message
    for error in (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError):  # NCCL says the rest with a type
        assert is_communication_failure(error("anything"))


@pytest.mark.parametrize("kind", ["hash", "tcp"])
def test_a_store_whose_rank_does_not_come_is_known(kind: str) -> None:
    limit = timedelta(milliseconds=50)
    store = dist.HashStore() if kind == "hash" else dist.TCPStore("127.0.0.1", 0, 1, True, limit)
    store.set_timeout(limit)
    for ask in (lambda: store.get("absent"), lambda: store.wait(["absent"])):
        with pytest.raises(RuntimeError) as caught:
            ask()
        assert is_communication_failure(caught.value), caught.value


def test_the_phrases_are_those_of_the_installed_torch() -> None:
    """A phrase that torch no longer has would be a guess; NCCL's are looked up where torch is built with it."""
    folder = Path(torch.__file__).parent / "lib"
    phrases = [p for p in UNTYPED_FAILURES.pattern.split("|") if p not in ("(?i:gloo)", "Socket Timeout")]
    names = {"cpu": [p for p in phrases if "NCCL" not in p], "cuda": [p for p in phrases if "NCCL" in p]}
    for name, expected in names.items():
        path = folder / f"libtorch_{name}.so"
        if not path.exists():
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for phrase in expected:
                assert content.find(re.sub(r"\\d$", "", phrase).encode()) >= 0, f"{phrase!r} is not in {path.name}"


HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
ROW = "   1: 01004D0A:D431 {}:C54F 01 {:08X}:00000000 01:00000014 {:08X}     0        0 123 1 0 20 4 30 10 -1\n"
FOUR, SIX = "02004D0A", "0000000000000000FFFF000003004D0A"


def test_only_unacknowledged_bytes_that_were_sent_again_count() -> None:
    table = HEAD + ROW.format(FOUR, 500, 4) + ROW.format("09004D0A", 500, 1) + ROW.format("08004D0A", 0, 6)
    assert unanswered(table) == {"10.77.0.2"}
    assert unanswered(HEAD + ROW.format(SIX, 1, 3)) == {"10.77.0.3"}
    assert unanswered(HEAD + ROW.format("00" * 15 + "01", 1, 3)) == {"::100:0"}
    assert unanswered(HEAD) == set()


def test_nobody_is_named_without_a_job(monkeypatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert own_address() == "" and silent_hosts({"192.0.2.200": "far"}) == ""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert own_address() == "127.0.0.1"
