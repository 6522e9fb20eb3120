"""What torch, gloo and NCCL say of a rank that is gone is known as that, and nothing else is."""

from __future__ import annotations

import mmap
import re
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.parallel_state.backend import UNTYPED_FAILURES, is_communication_failure
from tests.harness.tables import table

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
