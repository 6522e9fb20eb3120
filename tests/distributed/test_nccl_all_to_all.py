"""The host side of the NCCL exchange, over a library with NCCL's interface that runs on sockets and host memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.errors import CommunicationError
from megatron_samoe.ops import extension
from megatron_samoe.row_exchange.all_to_all import all_to_all_rows, exchange_counts
from megatron_samoe.row_exchange.nccl_communicator import nccl_problem
from tests.distributed.test_overlapped_dispatch import round_trip
from tests.harness import nccl_library
from tests.harness.compiled import ROOT, compile_one
from tests.harness.mortal_ranks import run_mortal_ranks
from tests.harness.ranks import run_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the stand-in for NCCL needs g++"),
]


def _random_exchanges(library: str, num_exchanges: int) -> str:
    generator = torch.Generator().manual_seed(11)
    world, rank = dist.get_world_size(), dist.get_rank()
    dtypes = (torch.float32, torch.int64, torch.bfloat16, torch.uint8)
    with nccl_library.communicator(library) as communicator:
        for exchange in range(num_exchanges):
            rows_WW = torch.randint(0, 400, (world, world), generator=generator)
            if exchange % 3 == 0:
                rows_WW[torch.rand(world, world, generator=generator) < 0.5] = 0
            if exchange % 5 == 0:
                rows_WW[:] = 0 if exchange % 2 else 4
            send, receive = rows_WW[rank].tolist(), rows_WW[:, rank].tolist()
            x = torch.randint(0, 255, (sum(send), (1, 3, 64, 257)[exchange % 4])).to(dtypes[exchange % len(dtypes)])
            got = communicator.exchange(x, send, receive)
            expected = torch.empty_like(got)
            dist.all_to_all_single(expected.view(torch.uint8), x.view(torch.uint8), receive, send)
            assert torch.equal(got, expected), exchange
    return torch.ops.megatron_samoe.nccl_library()


@pytest.mark.parametrize("world_size", [2, 4])
def test_equals_gloo(library, world_size):
    assert run_ranks(_random_exchanges, world_size, library, 50)[0] == f"{library} 2.18.1"


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


def _in_the_background(library: str) -> int:
    world = dist.get_world_size()
    threads = len(os.listdir("/proc/self/task"))
    with nccl_library.communicator(library) as communicator:
        more_threads = len(os.listdir("/proc/self/task")) - threads
        tensors = [torch.randn(world * 500 * (i + 1), 64) for i in range(5)]
        splits = [[500 * (i + 1)] * world for i in range(5)]
        out = torch.empty_like(tensors[3])
        pending = [
            communicator.start(x, rows, rows, out if i == 3 else None)
            for i, (x, rows) in enumerate(zip(tensors, splits, strict=True))
        ]
        between = communicator.exchange(tensors[0], splits[0], splits[0])
        for i in (3, 0, 1, 4, 2, 2):  # in any order, and again
            expected = torch.empty_like(tensors[i])
            dist.all_to_all_single(expected, tensors[i])
            assert torch.equal(pending[i].wait(), expected)
        assert pending[3].wait().data_ptr() == out.data_ptr()
        assert torch.equal(between, pending[0].wait())
        assert len(os.listdir("/proc/self/task")) == threads + more_threads
        dist.barrier()
        left = communicator.start(tensors[0], splits[0], splits[0])
        dist.barrier()
    with pytest.raises(CommunicationError, match="is closed"):
        left.wait()
    return more_threads


def test_exchanges_in_the_background_take_no_thread_of_their_own(library):
    assert run_ranks(_in_the_background, 3, library) == [3] * 3  # the watchdog, the bulletin and the library's stream


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
def test_an_exchange_that_fails_in_the_background_fails_where_it_is_waited_for(library, tmp_path, kind):
    survivor, _ = run_mortal_ranks(_error_in_the_background, 2, str(tmp_path), library, f"1:1:{kind}")
    assert 1 <= len(survivor) <= 3 and len(set(survivor)) == 1
    # What the rank sees first: the connection's end, what the other tells, or its own time-out.
    assert any(text in survivor[0] for text in ("closed the connection", "injected fault", "within 700 ms"))


def _parts_and_whole(library: str) -> None:
    with nccl_library.communicator(library) as communicator:
        group = replace(communicator.group, exchange=communicator)
        whole = round_trip(group, torch.float32, None)
        for num_chunks in (1, 3, 4):
            for ours, theirs in zip(round_trip(group, torch.float32, num_chunks)[:3], whole[:3], strict=True):
                assert torch.equal(ours, theirs)
        for ours, theirs in zip(whole, round_trip(replace(group, exchange=None), torch.float32, None), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_dispatch_in_parts_equals_one_in_one(library):
    run_ranks(_parts_and_whole, 2, library)


def test_the_device_is_asked_in_the_right_order(library, tmp_path):
    folder, program = ROOT / "cpp_ext", str(tmp_path / "check")
    names = ("all_to_all", "cuda_queue", "cuda_runtime", "nccl_all_to_all", "nccl_end", "nccl_api")
    sources = ["testing/row_exchange/check_nccl.cpp", *(f"comm/{name}.cpp" for name in names)]
    compile_one(["g++", "-std=c++17", "-pthread", *(str(folder / source) for source in sources), "-ldl", "-o", program])
    environment = {**os.environ, "MEGATRON_SAMOE_NCCL_LIB": library}
    result = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout == "all well\n" and result.returncode == 0, result.stdout + result.stderr


def _gradient(library: str) -> None:
    rank = dist.get_rank()
    rows_WW = torch.tensor([[2, 0], [1, 4]])
    send, receive = rows_WW[rank].tolist(), rows_WW[:, rank].tolist()
    with nccl_library.communicator(library) as communicator:
        x = torch.randn(sum(send), 4, requires_grad=True)
        y = all_to_all_rows(x, send, receive, replace(communicator.group, exchange=communicator))
        (dx,) = torch.autograd.grad(y, x, y.detach())
        assert torch.equal(dx, x)
        with pytest.raises(ValueError, match="rows in 2 ranks"):
            communicator.exchange(x, [1], [1])


def test_the_gradient_takes_the_way_back(library):
    run_ranks(_gradient, 2, library)


def _with_fault(library: str, fault: str, timeout_s: float) -> tuple[str, float, bool]:
    """The error's text, how long it took, and whether the communicator then repeats its reason."""
    world = dist.get_world_size()
    communicator = nccl_library.communicator(library, timeout_s, fault)
    x, rows = torch.ones(world * 50, 8), [50] * world
    for _ in range(10):
        start = time.monotonic()
        try:
            communicator.exchange(x, rows, rows)
        except CommunicationError as error:
            seconds = time.monotonic() - start
            # The others need this rank's sockets gone to see that it gave up: the abort closed them.
            with pytest.raises(CommunicationError) as again:
                communicator.exchange(x, rows, rows)
            return str(error), seconds, str(again.value) == str(error)
    return "no error", 0.0, False


def test_an_asynchronous_error_is_an_error_on_every_rank(library, tmp_path):
    results = run_mortal_ranks(_with_fault, 3, str(tmp_path), library, "1:2:error", 10.0)
    assert "injected fault" in results[1][0]
    for rank, (message, seconds, repeats) in enumerate(results):
        assert repeats and seconds < 5, (rank, message)
        assert f"rank {rank} of 3, exchange 3" in message and "'ep' through NCCL" in message
    assert "closed the connection" in results[0][0] and "closed the connection" in results[2][0]


def test_a_rank_that_hangs_is_a_timeout(library, tmp_path):
    results = run_mortal_ranks(_with_fault, 2, str(tmp_path), library, "1:1:hang", 0.7)
    for message, seconds, repeats in results:
        assert repeats and 0.3 < seconds < 5
        assert "within 700 ms" in message or "closed the connection" in message
    ended = "the device did not end the all-to-all of 3200 bytes sent and 3200 received, exchange 2, within 700 ms"
    assert any(ended in result[0] for result in results)


def test_a_rank_that_dies_is_an_error_on_the_others(library, tmp_path):
    first, second, third = run_mortal_ranks(_with_fault, 3, str(tmp_path), library, "1:4:exit", 10.0)
    assert second == 3
    for message, seconds, repeats in (first, third):
        assert "closed the connection" in message and repeats and seconds < 5


def _mismatch(library: str) -> str:
    communicator = nccl_library.communicator(library, 10.0)
    receive = [1, 1] if dist.get_rank() == 0 else [3, 1]
    try:
        communicator.exchange(torch.ones(2, 4), [1, 1], receive)
        communicator.exchange(torch.ones(2, 4), [1, 1], [1, 1])
    except CommunicationError as error:
        return str(error)
    return "no error"


def test_ranks_that_disagree_about_splits_are_told(library, tmp_path):
    first, second = run_mortal_ranks(_mismatch, 2, str(tmp_path), library)
    assert "sent 16 bytes, expected 48" in second
    assert "closed the connection" in first


def _abort_and_close(library: str) -> list[str]:
    messages = []
    communicator = nccl_library.communicator(library)
    dist.barrier()
    communicator.abort("loss is not a number")
    for _ in range(2):
        with pytest.raises(CommunicationError) as caught:
            communicator.exchange(torch.ones(2, 1), [1, 1], [1, 1])
        messages.append(str(caught.value))
        communicator.close()
    return messages


def test_abort_and_close(library):
    for aborted, closed in run_ranks(_abort_and_close, 2, library):
        assert "loss is not a number" in aborted and "is closed" in closed


def _no_library(path: str) -> tuple[bool, str]:
    return nccl_library.communicator(path) is None, nccl_problem()


def test_without_nccl_all_fall_back_and_the_search_is_told(tmp_path):
    missing = str(tmp_path / "libnowhere.so")
    for fell_back, problem in run_ranks(_no_library, 2, missing):
        assert fell_back and "no usable NCCL library" in problem and "libnowhere.so" in problem


@pytest.mark.parametrize("version, shown", [(21706, "2.17.6"), (30001, "3.0.1")])
def test_a_library_of_another_time_is_refused(library, version, shown):
    problem = run_ranks(_wrong_library, 2, library, str(version))[0]
    assert (
        f"it is NCCL {shown}, and 2.18 or a later NCCL 2 is needed" in problem and "MEGATRON_SAMOE_NCCL_LIB" in problem
    )


def _wrong_library(path: str, version: str = "") -> str:
    os.environ.update({"FAKE_NCCL_VERSION": version} if version else {})
    assert nccl_library.communicator(path) is None
    return nccl_problem()


def test_a_library_without_the_functions_is_refused(tmp_path):
    source, path = tmp_path / "empty.cpp", tmp_path / "libempty.so"
    source.write_text("")
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    assert "lacks a function of NCCL 2.18" in run_ranks(_wrong_library, 2, str(path))[0]
