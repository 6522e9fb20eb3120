"""NCCL exchanges on a device that runs behind the host: what is not there yet, what an abort leaves, and in which order a
process's communicators launch."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.errors import CommunicationError
from megatron_samoe.moe import alltoall_dispatcher
from megatron_samoe.moe.alltoall_dispatcher import AllToAllDispatcher
from megatron_samoe.ops import extension
from megatron_samoe.ops.asynchronous import HostCopy
from megatron_samoe.row_exchange import communicator as communicators
from megatron_samoe.row_exchange import nccl_communicator
from megatron_samoe.row_exchange.shm_communicator import create_shm_communicator
from tests.harness import nccl_library
from tests.harness.host_waits import as_if_asynchronous
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed

LARGE = 0x7FFF7FFF7FFF7FFF


def _poison(library: str) -> None:
    """The tests' own guard: who reads too early, or after an abort, finds neither old values nor plausible ones."""
    communicator = nccl_library.communicator(library, 30.0, host_waits=False)
    rows, counts = torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.int64)
    for out in (rows, counts, rows.bfloat16()):
        if dist.get_rank() == 1:
            dist.barrier()
        pending = communicator.start(torch.ones_like(out), [1, 1], [1, 1], out)
        assert pending.wait() is out
        if dist.get_rank() == 0:
            assert out.isnan().all() if out.is_floating_point() else (out == LARGE).all()
            dist.barrier()
        while not nccl_library.synchronize():
            pass
        assert (out == 1).all()
    communicator = nccl_library.communicator(library, 0.7, host_waits=False)
    if dist.get_rank() == 0:
        received = communicator.exchange_evenly(counts)
        while not nccl_library.synchronize():  # until the watchdog gives up
            pass
        assert (received == LARGE).all()
        with pytest.raises(CommunicationError, match="within 700 ms"):
            communicator.check()
    dist.barrier()


def test_memory_holds_poison_until_the_rows_are_there_and_after_an_abort(library):
    run_ranks(_poison, 2, library)


class _LateCopy(HostCopy):
    """A copy behind the exchange in the device's order."""

    def wait(self) -> torch.Tensor:
        while not nccl_library.synchronize():
            pass
        return super().wait()


def _counts_do_not_come(library: str, in_parts: bool) -> str:
    communicator = nccl_library.communicator(library, 0.7, host_waits=False)
    message = ""
    if dist.get_rank() == 0:
        group = replace(communicator.group, exchange=communicator)
        dispatcher = AllToAllDispatcher(4, group, 2 if in_parts else None)
        x_TH, ids_TK = torch.ones(6, 8), torch.arange(6)[:, None] % 4
        with as_if_asynchronous(), mock.patch.object(alltoall_dispatcher, "HostCopy", _LateCopy):
            with pytest.raises(CommunicationError) as caught:
                dispatcher.dispatch(x_TH, ids_TK).through(lambda rows_RH, _: rows_RH, torch.ones(6, 1))
        message = str(caught.value)
    dist.barrier()
    return message


@pytest.mark.parametrize("in_parts", [False, True])
def test_counts_that_an_abort_left_unwritten_are_not_used(library, in_parts):
    assert "within 700 ms" in run_ranks(_counts_do_not_come, 2, library, in_parts)[0]


def _two_communicators(library: str, take_turns: bool) -> str:
    """Exchanges of two communicators overlap; where ranks do not take turns alike, they wait for each other."""
    first, second = (nccl_library.communicator(library, 1.5) for _ in range(2))
    if not take_turns and dist.get_rank() == 1:
        first, second = second, first
    x = torch.arange(8.0)[:, None]
    try:
        for i in range(4):
            pending = [communicator.start(x + i, [4, 4], [4, 4]) for communicator in (first, second, first)]
            even = second.exchange_evenly(x)
            for exchange in (pending[2], pending[1], pending[0]):
                assert exchange.wait().shape == even.shape == (8, 1)
    except CommunicationError as error:
        return str(error)
    finally:
        dist.barrier()
    return ""


def _launched_late(library: str) -> str:
    """As where a start does not wait until NCCL has launched what it was given, which odd ranks' does late."""
    os.environ["FAKE_NCCL_LOOKS"] = "50"
    nccl_communicator.NcclCommunicator._in_slices = lambda self, state, op, *args: (
        ""
        if op is torch.ops.megatron_samoe.nccl_enqueue
        else communicators.Communicator._in_slices(self, state, op, *args)
    )
    return _two_communicators(library, True)


def test_communicators_launch_in_the_programs_order_on_all_ranks(library):
    assert run_ranks(_two_communicators, 2, library, True) == [""] * 2


def test_another_order_of_launches_is_found(library):
    for messages in (run_ranks(_two_communicators, 2, library, False), run_ranks(_launched_late, 2, library)):
        assert all(messages) and any("within 1500 ms" in message for message in messages), messages


def test_a_device_has_one_stream_for_all_exchanges(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: object())
    stream = nccl_communicator.exchange_stream
    assert stream(torch.device("cuda", 0)) is stream(torch.device("cuda", 0)) is not stream(torch.device("cuda", 1))
    stream.cache_clear()


def _wait_until_it_fails(communicator: nccl_communicator.NcclCommunicator, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    with pytest.raises(CommunicationError):
        while time.monotonic() < deadline:
            communicator.check()
            time.sleep(0.01)


def _another_fails(library: str, kind: str) -> tuple[str, float]:
    group = nccl_library.communicator(library, 30.0).group
    waiting = create_shm_communicator(group, 30.0) if kind == "shm" else nccl_library.communicator(library, 30.0)
    failing = nccl_library.communicator(library, 1.0)
    result = "", 0.0
    if dist.get_rank() == 0:
        failing.start(torch.ones(2, 1), [1, 1], [1, 1])  # nobody waits for it, and the other rank does not come
        started = time.monotonic()
        with pytest.raises(CommunicationError) as caught:
            waiting.exchange(torch.ones(2, 1), [1, 1], [1, 1])
        result = str(caught.value), time.monotonic() - started
    _wait_until_it_fails(failing)  # what is made before the other rank hears of it ends with it
    dist.barrier()
    later = nccl_library.communicator(library, 30.0)
    assert later.exchange(torch.ones(2, 1), [1, 1], [1, 1]).sum() == 2
    return result


@pytest.mark.parametrize("kind", ["nccl", "shm"])
def test_a_time_out_ends_the_waits_of_the_processs_other_communicators(library, kind):
    message, seconds = run_ranks(_another_fails, 2, library, kind)[0]
    assert "another exchange of this process failed: rank 0 of 2, exchange 1: the device did not end" in message
    assert seconds < 8


def _of_other_versions(library: str, version: str, build: str) -> tuple[bool, list[str]]:
    said: list[str] = []
    communicators.say_once = said.append
    if dist.get_rank() == 1 and version:
        os.environ["FAKE_NCCL_VERSION"] = version
    if dist.get_rank() == 1 and build:
        extension.build_identity = lambda: {"a compiled extension": build}
    return nccl_library.communicator(library) is None, said


def test_ranks_with_other_versions_are_told_before_they_connect(library):
    for refused, said in run_ranks(_of_other_versions, 2, library, "22907", ""):
        assert refused and "rank 0 has NCCL 2.18.1 and rank 1 has 2.29.7; install the same on all hosts" in said[0]
    for refused, said in run_ranks(_of_other_versions, 2, library, "", "from sources 0123 without CUDA kernels"):
        assert refused and "rank 0 has a compiled extension from sources " in said[0]
        assert "and rank 1 has from sources 0123 without CUDA kernels" in said[0]
