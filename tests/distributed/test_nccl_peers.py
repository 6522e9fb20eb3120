"""What ranks tell each other when one gives up, leaves or does not come, where NCCL itself tells nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.errors import CommunicationError
from megatron_samoe.ops import extension
from megatron_samoe.row_exchange import bulletin, nccl_communicator
from tests.harness import nccl_library
from tests.harness.ranks import run_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the stand-in for NCCL needs g++"),
]


def _open(library: str, timeout_s: float, fault: str = ""):
    os.environ["FAKE_NCCL_QUIET"] = "1"
    communicator = nccl_library.communicator(library, timeout_s, fault)
    world = communicator.group.size
    communicator.exchange(torch.ones(world, 1), [1] * world, [1] * world)
    return communicator


def _wait_in_vain(communicator, x: torch.Tensor | None = None) -> tuple[str, float]:
    """The error of an exchange that one rank does not join, and how long it took."""
    world, started = communicator.group.size, time.monotonic()
    with pytest.raises((CommunicationError, KeyboardInterrupt)) as caught:
        communicator.exchange(torch.ones(world, 1) if x is None else x, [1] * world, [1] * world)
    return f"{caught.typename}: {caught.value}", time.monotonic() - started


def _one_aborts(library: str) -> tuple[str, float]:
    communicator = _open(library, 30.0)
    if communicator.group.rank == 1:
        communicator.abort("loss is not a number")
    result = _wait_in_vain(communicator)
    dist.barrier()
    return result


@pytest.mark.parametrize("world_size", [2, 4])
def test_an_abort_reaches_the_others_within_a_second_or_so(library, world_size):
    for rank, (message, seconds) in enumerate(run_ranks(_one_aborts, world_size, library)):
        assert "loss is not a number" in message and seconds < 3
        if rank != 1:
            assert f"rank {rank} of {world_size}, exchange 2: rank 1 gave up" in message


def _one_leaves(library: str) -> tuple[str, float]:
    communicator = _open(library, 30.0)
    result = "", 0.0
    if communicator.group.rank == 1:
        communicator.close()
    else:
        result = _wait_in_vain(communicator)
    dist.barrier()
    return result


def test_a_rank_that_has_closed_is_not_waited_for(library):
    for rank, (message, seconds) in enumerate(run_ranks(_one_leaves, 4, library)):
        if rank != 1:
            assert "exchange 2: rank 1 closed the communicator after exchange 1" in message and seconds < 4


def _one_is_absent(library: str) -> tuple[str, float]:
    communicator = _open(library, 2.0)
    result = "", 0.0
    if communicator.group.rank != 1:
        result = _wait_in_vain(communicator)
    dist.barrier()
    return result


@pytest.mark.parametrize("world_size", [2, 4])
def test_who_did_not_come_is_named(library, world_size):
    for rank, (message, seconds) in enumerate(run_ranks(_one_is_absent, world_size, library)):
        if rank != 1:
            assert 1 < seconds < 5 and "in exchange 2 these ranks are missing: 1 (last in 1)" in message


def _interrupted(library: str, fault: str, in_background: bool) -> tuple[str, float]:
    communicator = _open(library, 30.0, fault)
    world, rank = communicator.group.size, communicator.group.rank
    result = "", 0.0
    if rank == 0:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            if in_background:
                communicator.start(torch.ones(world, 1), [1] * world, [1] * world)
            else:
                communicator.exchange_evenly(torch.ones(world, 1))
        result = "", time.monotonic() - started
    elif rank != 1:
        result = _wait_in_vain(communicator)
    dist.barrier()
    return result


@pytest.mark.parametrize("world_size, fault, in_background", [(2, "", False), (4, "0:1:connect", True)])
def test_an_interrupt_ends_the_wait_for_a_rank_that_does_not_come(library, world_size, fault, in_background):
    first, _absent, *others = run_ranks(_interrupted, world_size, library, fault, in_background)
    assert 0.4 < first[1] < 2
    for message, seconds in others:
        assert "rank 0 gave up: interrupted" in message and seconds < 3


def _leaves_within(library: str) -> tuple[str, float]:
    communicator, large = _open(library, 30.0), torch.ones(2, 1 << 20)
    result = "", 0.0
    if communicator.group.rank == 1:
        pending = communicator.start(large, [1, 1], [1, 1])
        communicator.close()
        del pending
    else:
        time.sleep(12)  # rank 1 waits for it so long at its end, twice
        result = _wait_in_vain(communicator, large)
    dist.barrier()
    return result


@pytest.mark.night
def test_a_rank_that_has_closed_in_an_exchange_is_not_waited_for(library):
    (message, seconds), _other = run_ranks(_leaves_within, 2, library)
    assert "rank 1 closed the communicator after exchange 1" in message and seconds < 4


_SERVER = "import time, torch.distributed as d; s = d.TCPStore('localhost', 0, is_master=True, wait_for_workers=False)"


def _store_stops(library: str) -> tuple[str, float]:
    server = subprocess.Popen(
        [sys.executable, "-c", f"{_SERVER}; print(s.port, flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        port = int(server.stdout.readline())
        bulletin._connection = lambda group, prefix: dist.PrefixStore(prefix, dist.TCPStore("localhost", port))
        communicator = _open(library, 2.0)
        server.send_signal(signal.SIGSTOP)
        time.sleep(0.6)  # the thread asks in between, and gets no answer
        result = _wait_in_vain(communicator) if communicator.group.rank == 0 else ("", 0.0)
        dist.barrier()
    finally:
        server.kill()
    return result


def test_time_outs_remain_when_the_store_stops_answering(library):
    (message, seconds), _other = run_ranks(_store_stops, 2, library)
    assert "CommunicationError" in message and 1 < seconds < 8


def _never_connects(library: str) -> tuple[bool, float]:
    nccl_library.use(library)
    os.environ["FAKE_NCCL_QUIET"] = "1"
    if dist.get_rank() == 1:
        nccl_communicator.connect = lambda handle, addresses: "it stops before it connects"
    started = time.monotonic()
    return nccl_library.communicator(library, 30.0) is None, time.monotonic() - started


def test_a_rank_that_cannot_connect_is_not_waited_for(library):
    for refused, seconds in run_ranks(_never_connects, 2, library):
        assert refused and seconds < 10
