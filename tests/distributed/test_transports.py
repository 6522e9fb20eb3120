"""What only one transport of rows does: who may have shared memory, and machines short of it; hops of NCCL within nodes and between
them; and which transport is chosen."""

from __future__ import annotations

import logging
import os
import re
import resource
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.errors import ConfigError
from megatron_samoe.log import logger
from megatron_samoe.ops import extension
from megatron_samoe.row_exchange.all_to_all import exchange_counts
from megatron_samoe.row_exchange.exchange import with_exchange
from megatron_samoe.row_exchange.hierarchical_communicator import nodes_problem
from megatron_samoe.row_exchange.shm_communicator import create_shm_communicator
from tests.harness import nccl_library
from tests.harness.exchanges import Transport, claim_host, error_of, world_group
from tests.harness.ranks import run_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built"),
]
SHM = Transport("shm", (0,) * 8, "")  # for any number of ranks up to eight


def _out_of_files(more: int) -> tuple[list[bool], list[str]]:
    """Rank 1 may open few files more while it connects, as where the system forbids a call."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    claim_host((0, 0))
    assert extension.load()
    dist.barrier()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if dist.get_rank() == 1:
        free = [os.dup(0) for _ in range(more + 1)]  # the lowest that are
        for file in free:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], limits[1]))
    fallen = [create_shm_communicator(world_group()) is None for _ in range(3)]
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert exchange_counts(torch.arange(2)[:, None], world_group()).flatten().tolist() == [dist.get_rank()] * 2
    return fallen, said


@pytest.mark.parametrize(
    ("more", "name"), [(0, "memfd_create"), (3, "(pidfd_open|open /proc/.*)")], ids=["own", "peer's"]
)
def test_a_call_that_the_system_refuses_makes_all_fall_back_and_is_told_once(more, name):
    for fallen, said in run_ranks(_out_of_files, 2, more):
        assert fallen == [True] * 3
        assert len(said) == 1 and re.search(f"{name}: Too many open files", said[0]) and "through torch" in said[0], (
            said
        )


def _falls_back(why: str) -> bool:
    if why == "another host":
        claim_host((0, 1))
    elif dist.get_rank() == 1:
        extension.load.cache_clear()
        os.environ[extension.ENVIRONMENT_VARIABLE] = "off"
    return create_shm_communicator(world_group()) is None


@pytest.mark.parametrize("why", ["another host", "no extension"])
def test_one_rank_that_cannot_share_memory_makes_all_fall_back(why):
    assert run_ranks(_falls_back, 2, why) == [True, True]


def _wrong_mark() -> str:
    """A peer's address with another mark: what a recycled process number would look like."""
    ops = torch.ops.megatron_samoe
    assert extension.load()
    first, second = ops.shm_create(0, 2, 50, 1.0), ops.shm_create(1, 2, 50, 1.0)
    pid, fd, window, mark = ops.all_to_all_address(second).split()
    try:
        return ops.all_to_all_connect(first, [ops.all_to_all_address(first), f"{pid} {fd} {window} {int(mark) ^ 1}"])
    finally:
        ops.all_to_all_close(first)
        ops.all_to_all_close(second)


def test_a_file_that_is_not_the_peers_segment_is_refused():
    assert "is not the peer's segment" in run_ranks(_wrong_mark, 1)[0]


def _stale_reader() -> float:
    """A slow reader: the sender must not write over what it has not read."""
    rank = dist.get_rank()
    with SHM.open() as communicator:
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
    group = world_group()
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


def _trouble_in_a_node(transport: Transport) -> tuple[str, float]:
    os.environ["FAKE_NCCL_QUIET"] = "1"
    communicator, started = transport.open(), time.monotonic()
    if dist.get_rank() == 1:
        communicator._local.abort("out of memory")
    message = error_of(lambda: communicator.exchange(torch.ones(4, 1), [1] * 4, [1] * 4))
    seconds = time.monotonic() - started
    dist.barrier()
    return message, seconds


@pytest.mark.parametrize("transport", ["nodes 0011"], indirect=True)
def test_trouble_inside_a_node_reaches_the_others(transport):
    for message, seconds in run_ranks(_trouble_in_a_node, 4, transport):
        assert "out of memory" in message and seconds < 5


def _rows_alone(transport: Transport) -> tuple[int, int]:
    world, rank, hosts = dist.get_world_size(), dist.get_rank(), transport.hosts
    with transport.open() as communicator:
        for _ in range(3):
            communicator.exchange(torch.ones(world * 2, 3), [2] * world, [2] * world)
        dist.barrier()
    count = partial(nccl_library.count, transport.library)
    sends = [count(f"sends to {peer}") for peer in range(world) if hosts[peer] != hosts[rank]]
    assert max(sends) == 3
    return sum(size > 0 for size in sends), count("ncclAlltoAll")


@pytest.mark.parametrize("transport", ["nodes 0011"], indirect=True)
def test_rows_go_to_one_peer_in_every_other_node(transport):
    """Numbers of rows are the same for all, and go through one call."""
    assert run_ranks(_rows_alone, 4, transport) == [(1, 0)] * 4


def test_nodes_that_do_not_fit_are_named():
    assert nodes_problem([0, 0, 2, 2]) == nodes_problem([0, 0, 0, 3, 3, 3]) == ""
    assert "one node" in nodes_problem([0, 0])
    for hosts in ([0, 1, 1], [0, 0, 1], [0, 1, 0, 1], [0, 0, 2, 2, 0, 0]):
        assert "equally many" in nodes_problem(hosts)


CHOICES = (
    ("auto", False, (0, 0), "ShmCommunicator"),
    ("extension", False, (0, 0), "ShmCommunicator"),
    ("torch", False, (0, 0), "NoneType"),
    ("auto", False, (0, 1), "NoneType"),
    ("extension", False, (0, 1), "cannot be had here"),
    ("extension", True, (0, 0), "needs CUDA"),
)


def _chosen() -> list[str]:
    said = []
    for backend, by_nodes, hosts, _ in CHOICES:
        claim_host(hosts)
        try:
            group = with_exchange(world_group(), torch.device("cpu"), 30.0, backend, by_nodes)
            said.append(type(group.exchange).__name__)
        except ConfigError as error:
            said.append(str(error))
        dist.barrier()  # a refusal takes no exchange: the other rank may not even have connected
    return said


def test_the_backend_is_the_one_asked_for_or_an_error():
    for said in run_ranks(_chosen, 2):
        assert all(found in each for (*_, found), each in zip(CHOICES, said, strict=True)), said
