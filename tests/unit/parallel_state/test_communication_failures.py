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

#: As their sources put them together, with what a run fills in.
SAID = (
    "Application timeout caused pair closure",
    "[/src/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1000ms for recv operation to complete",
    "[/src/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:26015. This is typically ...",
    "[enforce fail at /src/gloo/gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes. 1000 vs 4.",
    "Gloo connectFullMesh failed with [/src/gloo/gloo/transport/tcp/pair.cc:144] timed out connecting",
    "[Rank 0]: Rank 1 failed to pass monitoredBarrier in 1000 ms",
    "Wait timeout",
    "Timeout waiting for key: x after 200 ms",
    "Operation timed out!",
    "Detected mismatch between collectives on ranks. Rank 0 is running collective: ...",
    "NCCL Error 6: remote process exited or there was a network error",
    "NCCL Error 2: unhandled system error (run with NCCL_DEBUG=INFO for details)",
    "NCCL timeout when waiting for nonblocking call to become successful.",
)
OTHERS = (
    "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
    "CUDA error: out of memory",
    "CUDA out of memory. Tried to allocate 2.00 GiB.",
    "The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0",
    "DataLoader timed out after 5 seconds",
    "NCCL only supports CUDA tensors, but got a tensor on cpu",
    "Split sizes doesn't match total dim 0 size",
    "index 5 is out of bounds for dimension 0 with size 5",
)


@pytest.mark.parametrize("message", SAID)
def test_a_failure_of_communication_is_known(message: str) -> None:
    assert is_communication_failure(RuntimeError(message))


@pytest.mark.parametrize("message", OTHERS)
def test_another_error_is_none(message: str) -> None:
    assert not is_communication_failure(RuntimeError(message))


def test_nccl_says_the_rest_with_a_type() -> None:
    for kind in (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError):
        assert is_communication_failure(kind("anything"))


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
