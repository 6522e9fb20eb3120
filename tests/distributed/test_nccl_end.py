"""How NCCL communicators end: closed with their peers, given up, or left alone by forks and by the end of a process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.errors import CommunicationError
from megatron_samoe.ops import extension
from tests.harness import nccl_library
from tests.harness.ranks import run_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the stand-in for NCCL needs g++"),
]

MADE, FINALIZED, DESTROYED, ABORTED = (f"ncclComm{call}" for call in ("InitRankConfig", "Finalize", "Destroy", "Abort"))


def _calls(library: str) -> tuple[int, ...]:
    return tuple(nccl_library.count(library, call) for call in (MADE, FINALIZED, DESTROYED, ABORTED))


def _exchange(communicator) -> None:
    world = communicator.group.size
    x = torch.arange(world)[:, None] + 10 * communicator.group.rank
    received = communicator.exchange(x, [1] * world, [1] * world)
    assert received.flatten().tolist() == [10 * r + communicator.group.rank for r in range(world)]


def _many(library: str) -> tuple[int, int, tuple[int, ...]]:
    held = []
    for _ in range(6):
        with nccl_library.communicator(library) as communicator:
            _exchange(communicator)
        held.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    return held[-1][0] - held[1][0], held[-1][1] - held[1][1], _calls(library)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_closed_communicator_leaves_nothing(library, world_size):
    for descriptors, threads, calls in run_ranks(_many, world_size, library):
        assert descriptors <= 0 and threads <= 0 and calls == (6, 6, 6, 0)


def _close_slowly(library: str, fault: str, timeout_s: float) -> tuple[float, tuple[int, ...]]:
    communicator = nccl_library.communicator(library, timeout_s, fault)
    _exchange(communicator)
    dist.barrier()
    started = time.monotonic()
    communicator.close()
    return time.monotonic() - started, _calls(library)


def test_a_rank_that_does_not_finalize_is_not_waited_for_without_end(library):
    for seconds, calls in run_ranks(_close_slowly, 2, library, "1:1:finalize", 0.7):
        assert seconds < 3 and calls == (1, 1, 0, 1)


def test_a_rank_that_hangs_as_it_destroys_goes_on(library):
    other, hanging = run_ranks(_close_slowly, 2, library, "1:1:destroy", 0.7)
    assert other[1] == hanging[1] == (1, 1, 1, 0) and 0.6 < hanging[0] < 3


def _fork(library: str) -> tuple[str, int, tuple[int, ...]]:
    with nccl_library.communicator(library) as communicator:
        _exchange(communicator)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                communicator.exchange(torch.ones(2, 1), [1, 1], [1, 1])
            except CommunicationError as error:
                os.write(write, str(error).encode())
            communicator.close()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        message = os.read(read, 1000).decode()
        _exchange(communicator)  # which the child has left as it was
    return message, status, _calls(library)


def test_a_fork_may_close_what_is_not_its_own(library):
    for message, status, calls in run_ranks(_fork, 2, library):
        assert "not to its fork" in message and status == 0 and calls == (1, 1, 1, 0)


_NEVER_CLOSED = """
import torch
from megatron_samoe.errors import CommunicationError
from megatron_samoe.ops import extension
assert extension.load()
ops = torch.ops.megatron_samoe
handle = ops.nccl_create(0, 1, torch.device("cpu"), 0, 30.0)
assert ops.all_to_all_connect(handle, [ops.all_to_all_address(handle)]) == ""
while ops.all_to_all_finish(handle, 0, 0.1) == "pending":
    pass
"""


def test_a_process_ends_with_what_it_never_closed(library):
    environment = {**os.environ, "MEGATRON_SAMOE_NCCL_LIB": library}
    result = subprocess.run([sys.executable, "-c", _NEVER_CLOSED], env=environment, timeout=60, check=False)
    assert result.returncode == 0
