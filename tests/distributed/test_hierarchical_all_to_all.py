"""Exchanges in two hops, within a node and between nodes, over the stand-in for NCCL."""

from __future__ import annotations

import os
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.errors import ConfigError
from megatron_samoe.ops import extension
from megatron_samoe.row_exchange.exchange import with_exchange
from megatron_samoe.row_exchange.hierarchical_communicator import nodes_problem
from tests.harness import nccl_library
from tests.harness.exchanges import Transport, claim_host, error_of, world_group
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed


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


def _chosen(backend: str, by_nodes: bool, hosts: tuple[int, int]) -> str:
    claim_host(hosts)
    try:
        return type(with_exchange(world_group(), torch.device("cpu"), 30.0, backend, by_nodes).exchange).__name__
    except ConfigError as error:
        return str(error)
    finally:
        dist.barrier()  # a refusal takes no exchange: the other rank may not even have connected


@pytest.mark.parametrize(
    ("backend", "by_nodes", "hosts", "found"),
    [
        ("auto", False, (0, 0), "ShmCommunicator"),
        ("extension", False, (0, 0), "ShmCommunicator"),
        ("torch", False, (0, 0), "NoneType"),
        ("auto", False, (0, 1), "NoneType"),
        ("extension", False, (0, 1), "cannot be had here"),
        ("extension", True, (0, 0), "needs CUDA"),
    ],
)
@pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")
def test_the_backend_is_the_one_asked_for_or_an_error(backend, by_nodes, hosts, found):
    assert all(found in each for each in run_ranks(_chosen, 2, backend, by_nodes, hosts))
