"""The all-to-all over NCCL with one rank, which sends to itself: on a GPU over NCCL, on the CPU over the library of the
tests. Each test has a process of its own, because a process takes one library."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_samoe.errors import CommunicationError
from megatron_samoe.ops import extension
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange.communicator import connect
from megatron_samoe.row_exchange.nccl_communicator import NcclCommunicator, OpenedNccl, nccl_problem, new_handle
from tests.harness import nccl_library
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")


@pytest.fixture
def library(device: str, tmp_path: Path) -> str:
    """The library to use in place of NCCL; empty for NCCL itself."""
    if device == "cpu" and shutil.which("g++") is None:
        pytest.skip("the stand-in for NCCL needs g++")
    return nccl_library.build(tmp_path) if device == "cpu" else ""


def open_communicator(device: str, library: str, timeout_s: float = 30.0) -> NcclCommunicator:
    """Connects this process to itself; groups of one have no communicator otherwise."""
    if library:
        nccl_library.use(library)
    assert extension.load() and not nccl_problem(), nccl_problem()
    handle, stream = new_handle(0, 1, torch.device(device), timeout_s)
    assert connect(handle, [torch.ops.megatron_samoe.all_to_all_address(handle)]) == ""
    return NcclCommunicator(Group("ep", (0,), 0), OpenedNccl(handle, stream), timeout_s)


def what_is_sent_arrives(device: str, library: str) -> None:
    with open_communicator(device, library) as communicator:
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8):
            for rows, columns in ((0, 8), (1, 1), (7, 129), (513, 64), (20000, 64 if device == "cpu" else 1024)):
                x = torch.randint(0, 100, (rows, columns)).to(device, dtype)
                assert torch.equal(communicator.exchange(x, [rows], [rows]), x)
                assert torch.equal(communicator.exchange_evenly(x), x)
        x, index_R = torch.randn(50, 16).to(device), torch.randperm(100).to(device)
        gathered = communicator.exchange_gathered(x, index_R, 2, [100], [100])
        assert torch.equal(gathered, x[index_R // 2])


def streams_wait_for_each_other(device: str, library: str) -> None:
    """Rows are written late, before the exchange in the stream's order; and read in it, after the exchange."""
    module = torch.get_device_module(device)
    with open_communicator(device, library) as communicator:
        source = torch.randn(4000, 64).to(device)
        module.synchronize()
        for stream in (module.current_stream(), module.Stream()):
            with module.stream(stream):
                x = torch.zeros_like(source)
                if device == "cuda":
                    torch.cuda._sleep(100_000_000)  # clock cycles
                x.copy_(source)
                doubled = communicator.exchange(x, [4000], [4000]) * 2
                # In the background, while this stream computes; its memory is used again as soon as it is free.
                pending = [communicator.start(source + i, [4000], [4000]) for i in range(8)]
                product = source @ source.T
                received = [p.wait() for p in pending]
                for i, rows in enumerate(received):
                    assert torch.equal(rows, source + i), i
            assert torch.equal(doubled.cpu(), source.cpu() * 2)
            torch.testing.assert_close(product.cpu(), source.cpu() @ source.cpu().T, rtol=1e-3, atol=1e-3)


def after_an_abort_nothing_is_begun(device: str, library: str) -> None:
    communicator = open_communicator(device, library)
    x = torch.ones(10, 4, device=device)
    assert torch.equal(communicator.exchange(x, [10], [10]), x)
    communicator.abort("the test gives up")
    for _ in range(2):
        with pytest.raises(CommunicationError, match="the test gives up"):
            communicator.exchange(x, [10], [10])
    communicator.close()
    communicator.close()
    with pytest.raises(CommunicationError, match="closed"):
        communicator.exchange(x, [10], [10])
    with open_communicator(device, library) as another:
        assert torch.equal(another.exchange(x, [10], [10]), x)
    torch.get_device_module(device).synchronize()


@pytest.mark.parametrize("check", [what_is_sent_arrives, streams_wait_for_each_other, after_an_abort_nothing_is_begun])
def test_in_a_process_of_its_own(check: Callable[[str, str], None], device: str, library: str) -> None:
    run_ranks(check, 1, device, library)
