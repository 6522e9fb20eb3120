"""The host side of the NCCL exchange, over a library with NCCL's interface that runs on sockets and host memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.errors import CommunicationError
from megatron_samoe.ops import extension
from megatron_samoe.ops.all_to_all import all_to_all_rows
from megatron_samoe.ops.nccl_communicator import create_nccl_communicator, nccl_problem
from megatron_samoe.parallel_state.state import Group
from tests.harness.mortal_ranks import run_mortal_ranks
from tests.harness.ranks import run_ranks

SOURCE = Path(__file__).resolve().parents[2] / "cpp_ext" / "testing" / "fake_nccl.cpp"
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the stand-in for NCCL needs g++"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("nccl") / "libfakenccl.so"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread", str(SOURCE), "-o"]
    subprocess.run([*command, str(path)], check=True)
    return str(path)


def _communicator(library: str, timeout_s: float = 30.0, fault: str = ""):
    os.environ["MEGATRON_SAMOE_NCCL_LIB"] = library
    if fault:
        os.environ["FAKE_NCCL_FAULT"] = fault
    world = dist.get_world_size()
    group = Group("ep", tuple(range(world)), dist.get_rank(), dist.group.WORLD)
    return create_nccl_communicator(group, timeout_s, "cpu")


def _random_exchanges(library: str, num_exchanges: int) -> str:
    generator = torch.Generator().manual_seed(11)
    world, rank = dist.get_world_size(), dist.get_rank()
    dtypes = (torch.float32, torch.int64, torch.bfloat16, torch.uint8)
    with _communicator(library) as communicator:
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
    assert run_ranks(_random_exchanges, world_size, library, 50)[0] == f"{library} 21801 (host memory)"


def _gradient(library: str) -> None:
    rank = dist.get_rank()
    rows_WW = torch.tensor([[2, 0], [1, 4]])
    send, receive = rows_WW[rank].tolist(), rows_WW[:, rank].tolist()
    with _communicator(library) as communicator:
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
    communicator = _communicator(library, timeout_s, fault)
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
    communicator = _communicator(library, 10.0)
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
    communicator = _communicator(library)
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


def _many(library: str) -> int:
    descriptors = []
    for _ in range(8):
        with _communicator(library) as communicator:
            communicator.exchange(torch.ones(2, 1), [1, 1], [1, 1])
            dist.barrier()
        descriptors.append(len(os.listdir("/proc/self/fd")))
    return descriptors[-1] - descriptors[1]


def test_nothing_leaks(library):
    assert max(run_ranks(_many, 2, library)) <= 0


def _no_library(path: str) -> tuple[bool, str]:
    return _communicator(path) is None, nccl_problem()


def test_without_nccl_all_fall_back_and_the_search_is_told(tmp_path):
    missing = str(tmp_path / "libnowhere.so")
    for fell_back, problem in run_ranks(_no_library, 2, missing):
        assert fell_back and "no usable NCCL library" in problem and "libnowhere.so" in problem


def _wrong_library(path: str) -> str:
    assert _communicator(path) is None
    return nccl_problem()


def test_a_library_without_the_functions_is_refused(tmp_path):
    source, path = tmp_path / "empty.cpp", tmp_path / "libempty.so"
    source.write_text("")
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    assert "lacks a function of NCCL 2.18" in run_ranks(_wrong_library, 2, str(path))[0]
