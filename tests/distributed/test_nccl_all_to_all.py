"""The host side of the NCCL exchange, over a library with NCCL's interface that runs on sockets and host memory: which calls
it makes, which libraries it takes, faults of NCCL's own, and how communicators end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.errors import CommunicationError
from megatron_samoe.row_exchange import bulletin, nccl_communicator
from megatron_samoe.row_exchange.all_to_all import exchange_counts
from megatron_samoe.row_exchange.nccl_communicator import nccl_problem
from tests.harness import nccl_library
from tests.harness.compiled import ROOT, compile_one
from tests.harness.exchanges import Transport, error_of
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed


def _even(library: str) -> tuple[int, int]:
    world, rank = dist.get_world_size(), dist.get_rank()
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
    assert run_ranks(_even, 2, library) == [(3, 3)] * 2  # and nothing for no columns
    old = nccl_library.build(tmp_path, "-DFAKE_NCCL_OLD")
    assert run_ranks(_even, 2, old) == [(0, 3)] * 2


def _old_and_new(library: str, old: str) -> tuple[int, int]:
    return _even(old if dist.get_rank() == 1 else library)


def test_one_old_library_is_enough_for_sends_and_receives(library, tmp_path):
    old = nccl_library.build(tmp_path, "-DFAKE_NCCL_OLD")
    assert run_ranks(_old_and_new, 2, library, old) == [(0, 3)] * 2


def _error_in_the_background(library: str, fault: str) -> list[str]:
    communicator = nccl_library.communicator(library, 0.7, fault)
    x = torch.ones(100, 8)
    messages = []
    try:
        pending = [communicator.start(x, [50, 50], [50, 50]) for _ in range(3)]
    except CommunicationError as error:  # seen before the last has been started
        return [str(error)]
    for exchange in pending:
        try:
            exchange.wait()
        except CommunicationError as error:
            messages.append(str(error))
    with pytest.raises(CommunicationError):  # nothing that was computed meanwhile is kept
        communicator.check()
    return messages


@pytest.mark.parametrize("kind", ["error", "hang", "exit"])
def test_an_exchange_that_fails_in_the_background_fails_where_it_is_waited_for(library, kind):
    survivor, _ = run_ranks(_error_in_the_background, 2, library, f"1:1:{kind}", may_die=True)
    assert 1 <= len(survivor) <= 3 and len(set(survivor)) == 1
    # What the rank sees first: the connection's end, what the other tells, or its own time-out.
    assert any(text in survivor[0] for text in ("closed the connection", "injected fault", "within 700 ms"))


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


@pytest.mark.parametrize(
    ("transport", "fault", "timeout_s"),
    # Of nodes a first hop, and two second ones.
    first_by_day(
        [("nccl 000", "1:2:error", 10.0), ("nccl 00", "1:1:hang", 0.7), ("nodes 0011", "2:5:error", 1.5)]
        + [("nodes 0011", "3:4:exit", 1.5), ("nodes 0011", "1:3:hang", 1.5)],
        3,
    ),
    indirect=["transport"],
)
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


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("libnowhere.so", "21801", "no usable NCCL library"),
        ("libempty.so", "21801", "lacks a function of NCCL 2.18"),
        ("", "21706", "it is NCCL 2.17.6, and 2.18 or a later NCCL 2 is needed"),
        ("", "30001", "it is NCCL 3.0.1, and 2.18 or a later NCCL 2 is needed"),
    ],
)
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


def _leaves_within(library: str) -> tuple[str, float]:
    os.environ["FAKE_NCCL_QUIET"] = "1"
    communicator, large = nccl_library.communicator(library, 30.0), torch.ones(2, 1 << 20)
    communicator.exchange(large, [1, 1], [1, 1])
    message, started = "", time.monotonic()
    if communicator.group.rank == 1:
        pending = communicator.start(large, [1, 1], [1, 1])
        communicator.close()
        del pending
    else:
        time.sleep(12)  # rank 1 waits for it so long at its end, twice
        started = time.monotonic()
        message = error_of(lambda: communicator.exchange(large, [1, 1], [1, 1]))
    seconds = time.monotonic() - started
    dist.barrier()
    return message, seconds


@pytest.mark.night
def test_a_rank_that_has_closed_in_an_exchange_is_not_waited_for(library):
    (message, seconds), _other = run_ranks(_leaves_within, 2, library)
    assert "rank 1 closed the communicator after exchange 1" in message and seconds < 4


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
