"""The host side of the NCCL exchange, over a library with NCCL's interface that runs on sockets and host memory: which calls
it makes and in which order, which libraries it takes, faults of NCCL's own, how communicators end, and what the device has not
done yet when the host goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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
from megatron_samoe.row_exchange import bulletin, nccl_communicator
from megatron_samoe.row_exchange import communicator as communicators
from megatron_samoe.row_exchange.all_to_all import exchange_counts
from megatron_samoe.row_exchange.nccl_communicator import nccl_problem
from megatron_samoe.row_exchange.shm_communicator import create_shm_communicator
from tests.harness import nccl_library
from tests.harness.compiled import ROOT, compile_one
from tests.harness.exchanges import Transport, error_of
from tests.harness.host_waits import as_if_asynchronous
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks
from tests.harness.tables import table

pytestmark = pytest.mark.distributed
TABLE = table(__file__)


def _even(*libraries: str) -> tuple[int, int]:
    """Exchanges equal parts, each rank by its own library; returns how often by one call, and sends to the other rank."""
    world, rank = dist.get_world_size(), dist.get_rank()
    library = libraries[rank]
    with nccl_library.communicator(library) as communicator:
        for columns in (1, 5, 0):
            x = torch.arange(world * 3 * columns).view(world * 3, columns) * (rank + 1)
            expected = torch.cat([x[rank * 3 : rank * 3 + 3] // (rank + 1) * (r + 1) for r in range(world)])
            assert torch.equal(communicator.exchange_evenly(x), expected)
        counts_WE = torch.arange(world * 2).view(world, 2) + 100 * rank
        group = replace(communicator.group, exchange=communicator)
        expected = torch.stack([torch.arange(2) + 2 * rank + 100 * r for r in range(world)])
        assert torch.equal(exchange_counts(counts_WE, group), expected)
        assert torch.ops.megatron_samoe.nccl_library() == f"{library} 2.18.1"
    return nccl_library.count(library, "ncclAlltoAll"), nccl_library.count(library, f"sends to {1 - rank}")


def test_equal_parts_go_through_one_call_where_every_library_has_it(library, tmp_path):
    assert run_ranks(_even, 2, library, library) == [(3, 3)] * 2  # and nothing for no columns
    old = nccl_library.build(tmp_path, "-DFAKE_NCCL_OLD")
    assert run_ranks(_even, 2, library, old) == [(0, 3)] * 2


def test_the_device_is_asked_in_the_right_order(library, tmp_path):
    folder, program = ROOT / "cpp_ext", str(tmp_path / "check")
    names = ("all_to_all", "cuda_queue", "cuda_runtime", "nccl_all_to_all", "nccl_end", "nccl_api")
    sources = ["testing/row_exchange/check_nccl.cpp", *(f"comm/{name}.cpp" for name in names)]
    compile_one(["g++", "-std=c++17", "-pthread", *(str(folder / source) for source in sources), "-ldl", "-o", program])
    environment = {**os.environ, "MEGATRON_SAMOE_NCCL_LIB": library}
    result = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout == "all well\n" and result.returncode == 0, result.stdout + result.stderr


def _with_fault(transport: Transport, fault: str, timeout_s: float) -> tuple[str, float]:
    """Returns the error that a fault makes, which the communicator then repeats, and the seconds to it."""
    world = dist.get_world_size()
    communicator = transport.open(timeout_s, fault)
    x, rows = torch.ones(world * 50, 8), [50] * world
    for _ in range(10):
        start = time.monotonic()
        try:
            communicator.exchange(x, rows, rows)
        except CommunicationError as error:
            seconds = time.monotonic() - start
            # The others need this rank's sockets gone to see that it gave up: the abort closed them.
            again = error_of(lambda: communicator.exchange(x, rows, rows))
            assert again == str(error) or transport.kind == "nodes"
            communicator.close()
            return str(error), seconds
    return "no error", 0.0


@pytest.mark.parametrize(("transport", "fault", "timeout_s"), first_by_day(TABLE["faults"], 3), indirect=["transport"])
def test_a_fault_of_one_rank_is_an_error_on_every_rank(transport: Transport, fault: str, timeout_s: float) -> None:
    victim, group, kind = fault.split(":")
    results = run_ranks(_with_fault, transport.world_size, transport, fault, timeout_s, may_die=True)
    if kind == "exit":
        assert results.pop(int(victim)) == 3
    for message, seconds in results:
        assert seconds < 5 and "'ep' through " in message, message
        assert transport.kind == "nodes" or f"exchange {int(group) + 1}" in message
    said = [message for message, _ in results]
    if transport.kind == "nccl" and kind == "error":
        assert "injected fault" in said.pop(int(victim)) and all("closed the connection" in other for other in said)
    elif transport.kind == "nccl":
        ended = "the device did not end the all-to-all of 3200 bytes sent and 3200 received, exchange 2, within 700 ms"
        assert any(ended in message for message in said), said


def _refused(path: str, version: str) -> str:
    os.environ["FAKE_NCCL_VERSION"] = version
    assert nccl_library.communicator(path) is None
    return nccl_problem()


@pytest.mark.parametrize(("name", "version", "said"), TABLE["refused"])
def test_without_a_library_that_is_usable_all_fall_back(library, tmp_path, name, version, said):
    source = tmp_path / "empty.cpp"
    source.write_text("")
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(tmp_path / "libempty.so")], check=True)
    for problem in run_ranks(_refused, 2, str(tmp_path / name) if name else library, version):
        assert said in problem and (name or "MEGATRON_SAMOE_NCCL_LIB") in problem


def _close_slowly(library: str, fault: str, timeout_s: float) -> tuple[float, tuple[int, ...]]:
    communicator = nccl_library.communicator(library, timeout_s, fault)
    communicator.exchange(torch.ones(2, 1), [1, 1], [1, 1])
    dist.barrier()
    started = time.monotonic()
    communicator.close()
    return time.monotonic() - started, nccl_library.calls(library)


@pytest.mark.parametrize(("call", "calls"), [("finalize", (1, 1, 0, 1)), ("destroy", (1, 1, 1, 0))])
def test_a_rank_whose_end_hangs_is_not_waited_for_without_end(library, call, calls):
    (other, of_other), (hanging, of_hanging) = run_ranks(_close_slowly, 2, library, f"1:1:{call}", 0.7)
    assert of_other == of_hanging == calls and other < 3 and 0.6 < hanging < 3


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


_SERVER = "import time, torch.distributed as d; s = d.TCPStore('localhost', 0, is_master=True, wait_for_workers=False)"


def _store_stops(library: str) -> float:
    server = subprocess.Popen(
        [sys.executable, "-c", f"{_SERVER}; print(s.port, flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
        text=True,
    )
    seconds, x = 0.0, torch.ones(2, 1)
    try:
        port = int(server.stdout.readline())
        bulletin._connection = lambda group, prefix: dist.PrefixStore(prefix, dist.TCPStore("localhost", port))
        communicator = nccl_library.communicator(library, 2.0)
        communicator.exchange(x, [1, 1], [1, 1])
        server.send_signal(signal.SIGSTOP)
        time.sleep(0.6)  # the thread asks in between, and gets no answer
        if communicator.group.rank == 0:
            started = time.monotonic()
            error_of(lambda: communicator.exchange(x, [1, 1], [1, 1]))
            seconds = time.monotonic() - started
        dist.barrier()
    finally:
        server.kill()
    return seconds


def test_time_outs_remain_when_the_store_stops_answering(library):
    assert 1 < run_ranks(_store_stops, 2, library)[0] < 8


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


def _not_there_yet(library: str) -> None:
    communicator = nccl_library.communicator(library, 30.0, host_waits=False)
    if dist.get_rank() == 1:
        dist.barrier()
    rows = torch.zeros(2, 4)
    assert communicator.start(torch.ones(2, 4), [1, 1], [1, 1], rows).wait() is rows
    if dist.get_rank() == 0:
        assert rows.isnan().all(), "the host does not wait for the other rank, which sends when this one is here"
        dist.barrier()
    while not nccl_library.synchronize():
        pass
    assert (rows == 1).all()


def test_a_host_does_not_wait_for_rows(library):
    run_ranks(_not_there_yet, 2, library)


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


def _two_communicators(library: str) -> None:
    """Exchanges of two communicators overlap; if ranks did not take turns alike, they would wait for each other."""
    first, second = (nccl_library.communicator(library, 1.5) for _ in range(2))
    x = torch.arange(8.0)[:, None]
    for i in range(4):
        pending = [communicator.start(x + i, [4, 4], [4, 4]) for communicator in (first, second, first)]
        even = second.exchange_evenly(x)
        for exchange in (pending[2], pending[1], pending[0]):
            assert exchange.wait().shape == even.shape == (8, 1)
    dist.barrier()


def test_communicators_launch_in_the_programs_order_on_all_ranks(library):
    run_ranks(_two_communicators, 2, library)


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
