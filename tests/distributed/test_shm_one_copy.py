"""Exchanges whose rows are gathered straight into shared memory, groups that span hosts, and machines short of memory."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.errors import CommunicationError
from megatron_samoe.ops import extension, reference
from megatron_samoe.ops.permute import invert_index, make_permutation
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange import shm_communicator
from megatron_samoe.row_exchange.all_to_all import Route, dispatch_rows, return_rows
from megatron_samoe.row_exchange.hostwise_communicator import HostwiseCommunicator
from megatron_samoe.row_exchange.shm_communicator import ShmCommunicator, create_shm_communicator
from tests.harness.mortal_ranks import run_mortal_ranks
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built"),
]


def _group(hosts: tuple[int, ...] | None = None) -> Group:
    """The group of all ranks; `hosts` says on which host each one claims to be."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if hosts is not None:
        shm_communicator._host_identity = lambda: (f"boot {hosts[rank]}", "pid:[1]", 0)
    return Group("ep", tuple(range(world)), rank, dist.group.WORLD)


def _communicator(hosts: tuple[int, ...] | None = None, timeout_s: float = 30.0):
    communicator = create_shm_communicator(_group(hosts), timeout_s)
    assert communicator is not None
    return communicator


def _gloo(x, send, receive):
    received = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(received.view(torch.uint8), x.view(torch.uint8), receive, send)
    return received


def _mixed_exchanges(num_exchanges: int, hosts: tuple[int, ...] | None) -> str:
    """Gathered and ordinary exchanges in a random order that differs from rank to rank."""
    world, rank = dist.get_world_size(), dist.get_rank()
    shared, own = torch.Generator().manual_seed(3), torch.Generator().manual_seed(rank)
    with _communicator(hosts) as communicator:
        for exchange in range(num_exchanges):
            large = exchange % 11 == 5
            rows_WW = torch.randint(0, 3000 if large else 60, (world, world), generator=shared)
            if exchange % 3 == 0:
                rows_WW[torch.rand(world, world, generator=shared) < 0.5] = 0
            dtype = (torch.float32, torch.bfloat16)[exchange % 2]
            width = (1, 3, 64, 257)[exchange % 4]
            send, receive = rows_WW[rank].tolist(), rows_WW[:, rank].tolist()
            topk = 1 + exchange % 2
            x = torch.randn(max(1, sum(send)), width, generator=own).to(dtype)
            index = torch.randint(0, topk * x.shape[0], (sum(send),), generator=own)
            rows = x[index // topk]
            if torch.rand(1, generator=own) < 0.6:
                got = communicator.exchange_gathered(x, index, topk, send, receive)
            else:
                got = communicator.exchange(rows, send, receive)
            assert torch.equal(got, _gloo(rows, send, receive)), exchange
        return type(communicator).__name__


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_gathered_exchanges_equal_gloo(world_size):
    assert run_ranks(_mixed_exchanges, world_size, 60, None) == ["ShmCommunicator"] * world_size


@pytest.mark.parametrize("hosts", [(0, 0, 1), (0, 1, 0, 1), (0, 0, 1, 1)])
def test_a_group_that_spans_hosts_equals_gloo(hosts):
    assert run_ranks(_mixed_exchanges, len(hosts), 40, hosts) == ["HostwiseCommunicator"] * len(hosts)


def _route_there_and_back(hosts: tuple[int, ...] | None, communicating: bool) -> tuple[torch.Tensor, ...]:
    """Output and gradient of an MoE dispatch whose experts scale their rows."""
    world, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(40, 16, generator=generator, requires_grad=True)
    ids_TK = torch.randint(-1, 2 * world, (40, 2), generator=generator)
    permutation = make_permutation(ids_TK, 2 * world)
    sent_We = permutation.counts_E.view(world, 2)
    received_We = torch.empty_like(sent_We)
    dist.all_to_all_single(received_We, sent_We)
    from megatron_samoe.moe.alltoall_dispatcher import expert_major_order

    order_R = expert_major_order(received_We, int(received_We.sum()))
    route = Route(sent_We.sum(1).tolist(), received_We.sum(1).tolist(), order_R, invert_index(order_R))
    group = _group(hosts)
    if communicating:
        group = replace(group, exchange=_communicator(hosts))
    rows_RH = dispatch_rows(x, permutation, route, group)
    scale_R = torch.arange(1.0, rows_RH.shape[0] + 1)[:, None]
    y_NH = return_rows(rows_RH * scale_R, route, group)
    (dx,) = torch.autograd.grad(y_NH, x, torch.ones_like(y_NH).cumsum(0))
    return rows_RH.detach(), y_NH.detach(), dx


@pytest.mark.parametrize("hosts", [None, (0, 0, 1)])
def test_the_fused_dispatch_equals_its_parts(hosts):
    fused = run_ranks(_route_there_and_back, 3, hosts, True)
    parts = run_ranks(_route_there_and_back, 3, None, False)
    for ours, theirs in zip(fused, parts, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _memory_of_a_window(num: int) -> tuple[int, int]:
    """Growth of descriptors and of resident memory in KB over many communicators with windows."""
    world = dist.get_world_size()
    x, index, rows = torch.ones(4096 * world, 64), torch.arange(4096 * world), [4096] * world
    sizes = []
    for _ in range(num):
        with _communicator() as communicator:
            for _ in range(3):
                communicator.exchange_gathered(x, index, 1, rows, rows)
            dist.barrier()
        resident = int(open("/proc/self/statm").read().split()[1]) * 4
        sizes.append((len(os.listdir("/proc/self/fd")), resident))
    warm = sizes[len(sizes) // 4]
    assert not [name for name in os.listdir("/dev/shm") if "samoe" in name]
    return sizes[-1][0] - warm[0], sizes[-1][1] - warm[1]


@pytest.mark.parametrize("num", first_by_day([24, 1000]))
def test_windows_leave_neither_descriptors_nor_memory(num):
    for descriptors, kilobytes in run_ranks(_memory_of_a_window, 2, num, timeout_s=600):
        assert descriptors == 0 and kilobytes < 4096, (descriptors, kilobytes)


def _stale_reader() -> float:
    """A slow reader: the sender must not write over what it has not read."""
    rank = dist.get_rank()
    with _communicator() as communicator:
        total = 0.0
        for exchange in range(8):
            x = torch.full((5000, 64), float(exchange + 1))
            send, receive = ([0, 5000], [0, 0]) if rank == 0 else ([0, 0], [5000, 0])
            if rank == 1:
                time.sleep(0.03)
                total += float(communicator.exchange(x[:0], send, receive).double().mean())
            else:
                communicator.exchange_gathered(x, torch.arange(5000), 1, send, receive)
        dist.barrier()
        return total


def test_a_window_is_not_written_before_it_is_read():
    assert run_ranks(_stale_reader, 2)[1] == sum(range(1, 9))


def _without_memory(limit_bytes: int) -> tuple[str, bool]:
    """Rank 1 may not make files beyond a size, as where shared memory has run out."""
    world, rank = dist.get_world_size(), dist.get_rank()
    group = _group()
    dist.barrier()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    communicator = create_shm_communicator(group, 20.0)
    x, rows = torch.arange(world * 65536, dtype=torch.float32).view(-1, 64) + rank, [1024] * world
    expected = torch.cat([torch.arange(world * 65536).view(-1, 64)[rank * 1024 :][:1024] + r for r in range(world)])
    if communicator is None:
        return "torch", True
    got = communicator.exchange_gathered(x, torch.arange(x.shape[0]), 1, rows, rows)
    return type(communicator).__name__, torch.equal(got, expected.float())


def test_a_machine_without_shared_memory_falls_back():
    assert run_ranks(_without_memory, 2, 1 << 20) == [("torch", True)] * 2  # no segment: torch for all
    # A segment, no window: this rank's rows go through the rings.
    assert run_ranks(_without_memory, 2, 4 << 20) == [("ShmCommunicator", True)] * 2


def _killed_at_random(seed: int, hosts: tuple[int, ...] | None) -> tuple[str, float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    communicator = _communicator(hosts, timeout_s=20.0)
    x, index, rows = torch.ones(world * 2000, 256), torch.arange(world * 2000), [2000] * world
    dist.barrier()
    delay = float(torch.rand(1, generator=torch.Generator().manual_seed(seed))) * 0.08
    if rank == world - 1:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
    while True:
        start = time.monotonic()
        try:
            communicator.exchange_gathered(x, index, 1, rows, rows)
            communicator.exchange(x, rows, rows)
        except CommunicationError as error:
            return str(error), time.monotonic() - start


@pytest.mark.parametrize("seed", first_by_day(range(60), 4))
def test_a_rank_killed_at_any_point_is_an_error_on_the_others(tmp_path, seed):
    results = run_mortal_ranks(_killed_at_random, 3, str(tmp_path), seed, None)
    assert results[2] == -signal.SIGKILL
    for message, seconds in results[:2]:
        assert "rank 2" in message and seconds < 5, message
    assert not [name for name in os.listdir("/dev/shm") if "samoe" in name]


@pytest.mark.parametrize("hosts", [(0, 0, 1), (0, 1, 1)])
def test_a_rank_killed_on_another_host_is_an_error_here(tmp_path, hosts):
    results = run_mortal_ranks(_killed_at_random, 3, str(tmp_path), 7, hosts)
    assert results[2] == -signal.SIGKILL
    assert all("'ep'" in message and seconds < 15 for message, seconds in results[:2])


def _a_gigabyte() -> tuple[bool, bool]:
    world, rank = dist.get_world_size(), dist.get_rank()
    rows = [(1 << 28) // 1024 // world] * world
    x = torch.arange(sum(rows) * 1024, dtype=torch.float32).view(-1, 1024) + rank
    index = torch.arange(x.shape[0])
    with _communicator() as communicator:
        expected = torch.cat([x[rank * rows[0] : (rank + 1) * rows[0]] - rank + r for r in range(world)])
        plain = torch.equal(communicator.exchange(x, rows, rows), expected)
        return plain, torch.equal(communicator.exchange_gathered(x, index, 1, rows, rows), expected)


@pytest.mark.night  # a gigabyte a rank
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_gigabyte(world_size):
    assert run_ranks(_a_gigabyte, world_size, timeout_s=300) == [(True, True)] * world_size


def _in_the_background() -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    with _communicator() as communicator:
        tensors = [torch.randn(world * 50 * (i + 1), 8) for i in range(5)]
        pending = [communicator.start(x, [50 * (i + 1)] * world, [50 * (i + 1)] * world) for i, x in enumerate(tensors)]
        between = communicator.exchange(tensors[0], [50] * world, [50] * world)  # after those that were started
        for i, (x, exchange) in enumerate(zip(tensors, pending, strict=True)):
            rows = [50 * (i + 1)] * world
            assert torch.equal(exchange.wait(), _gloo(x, rows, rows))
        assert torch.equal(between, pending[0].wait())
        dist.barrier()
        if rank == 0:
            communicator.abort("given up in the background")
        with pytest.raises(CommunicationError, match="given up in the background"):
            communicator.start(tensors[0], [50] * world, [50] * world).wait()


def test_exchanges_in_the_background_keep_their_order():
    run_ranks(_in_the_background, 3)


def _refused() -> None:
    x, index = torch.ones(4, 2), torch.arange(4)
    with _communicator() as communicator:
        assert isinstance(communicator, ShmCommunicator) and not isinstance(communicator, HostwiseCommunicator)
        with pytest.raises(RuntimeError, match="outside 0 to 3"):
            communicator.exchange_gathered(x, index + 1, 1, [2, 2], [2, 2])
        with pytest.raises(RuntimeError, match="not Long"):
            communicator.exchange_gathered(x, index.int(), 1, [2, 2], [2, 2])
        with pytest.raises(ValueError, match="none may be negative"):
            communicator.exchange(x, [5, -1], [2, 2])
        with pytest.raises(ValueError, match="x is on meta"):
            communicator.exchange(x.to("meta"), [2, 2], [2, 2])
        with pytest.raises(ValueError, match="dense rows"):
            communicator.exchange(x.to_sparse(), [2, 2], [2, 2])
        assert torch.equal(communicator.exchange_gathered(x, index, 1, [2, 2], [2, 2]), reference.permute(x, index, 1))
        dist.barrier()


def test_wrong_arguments_are_refused_before_anything_is_sent():
    run_ranks(_refused, 2)
