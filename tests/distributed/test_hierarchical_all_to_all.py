"""Exchanges in two hops, within a node and between nodes, over the stand-in for NCCL."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.errors import CommunicationError, ConfigError
from megatron_samoe.ops import extension
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange import shm_communicator
from megatron_samoe.row_exchange.exchange import with_exchange
from megatron_samoe.row_exchange.hierarchical_communicator import (
    HierarchicalCommunicator,
    create_hierarchical_communicator,
    nodes_problem,
    plan_two_hops,
)
from megatron_samoe.row_exchange.nccl_communicator import NcclCommunicator
from tests.distributed.test_overlapped_dispatch import round_trip
from tests.harness import nccl_library
from tests.harness.mortal_ranks import run_mortal_ranks
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the stand-in for NCCL needs g++"),
]


def _communicator(library: str, hosts: tuple[int, ...], timeout_s: float = 30.0, fault: str = ""):
    nccl_library.use(library, fault)
    world, rank = dist.get_world_size(), dist.get_rank()
    shm_communicator._host_identity = lambda: (f"boot {hosts[rank]}", "pid:[1]", 0)
    group = Group("ep", tuple(range(world)), rank, dist.group.WORLD)
    return create_hierarchical_communicator(group, timeout_s, "cpu")


@pytest.mark.parametrize("num_nodes, num_local", [(2, 2), (3, 2), (2, 4), (4, 3)])
def test_the_plan_brings_every_byte_to_its_place(num_nodes: int, num_local: int) -> None:
    """The plans of all ranks, carried out on bytes that name sender, receiver and place."""
    generator = torch.Generator().manual_seed(num_nodes)
    world = num_nodes * num_local
    bytes_WW = torch.randint(0, 5, (world, world), generator=generator)
    bytes_WW[torch.rand(world, world, generator=generator) < 0.3] = 0
    plans, inputs, outputs, staging = [], [], [], []
    for rank in range(world):
        node, index = divmod(rank, num_local)
        here = bytes_WW[node * num_local : (node + 1) * num_local]
        plan = plan_two_hops(
            rank, bytes_WW[rank].tolist(), bytes_WW[:, rank].tolist(), here[:, index::num_local].tolist()
        )
        plans.append(plan)
        inputs.append([(rank, to, i) for to in range(world) for i in range(bytes_WW[rank, to])])
        outputs.append([None] * int(bytes_WW[:, rank].sum()))
        staging.append([None] * plan.staging_bytes)
    between_nodes = 0
    for hop in ("first", "second"):
        on_the_way: dict[tuple[int, int], list] = {pair: [] for pair in product(range(world), repeat=2)}
        for rank, plan in enumerate(plans):
            for peer, staged, start, size in torch.tensor(getattr(plan, f"{hop}_sends")).view(-1, 4).tolist():
                if size:
                    on_the_way[rank, peer].append((staging if staged else inputs)[rank][start : start + size])
                    if peer // num_local != rank // num_local:
                        between_nodes += 1
        for rank, plan in enumerate(plans):
            for peer, staged, start, size in torch.tensor(getattr(plan, f"{hop}_receives")).view(-1, 4).tolist():
                if size:
                    message = on_the_way[peer, rank].pop(0)
                    assert len(message) == size
                    (staging if staged else outputs)[rank][start : start + size] = message
        assert not any(on_the_way.values())
    for rank in range(world):
        assert outputs[rank] == [(source, rank, i) for source in range(world) for i in range(bytes_WW[source, rank])]
    assert between_nodes <= world * (num_nodes - 1)


def _random_exchanges(library: str, hosts: tuple[int, ...], num_exchanges: int) -> int:
    generator = torch.Generator().manual_seed(5)
    world, rank = dist.get_world_size(), dist.get_rank()
    with _communicator(library, hosts) as communicator:
        assert isinstance(communicator, HierarchicalCommunicator)
        for exchange in range(num_exchanges):
            rows_WW = torch.randint(0, 60 if exchange != 22 else 3000, (world, world), generator=generator)
            if exchange % 3 == 0:
                rows_WW[torch.rand(world, world, generator=generator) < 0.5] = 0
            if exchange % 7 == 3:
                rows_WW[:] = 0 if exchange % 2 else 4
            send, receive = rows_WW[rank].tolist(), rows_WW[:, rank].tolist()
            x = torch.randint(0, 255, (sum(send), (1, 3, 64, 257)[exchange % 4])).to(
                (torch.float32, torch.int64, torch.bfloat16)[exchange % 3]
            )
            got = communicator.exchange(x, send, receive)
            expected = torch.empty_like(got)
            dist.all_to_all_single(expected.view(torch.uint8), x.view(torch.uint8), receive, send)
            assert torch.equal(got, expected), exchange
        pending = [
            communicator.start(torch.full((world, 2), float(rank + i)), [1] * world, [1] * world) for i in range(4)
        ]
        for i in (1, 0, 3, 2):
            assert pending[i].wait()[:, 0].tolist() == [float(r + i) for r in range(world)]
        group = replace(communicator.group, exchange=communicator)
        for num_chunks in (None, 2) if world == 4 else ():  # which divides the experts
            ours = round_trip(group, torch.float32, num_chunks)
            for y, expected in zip(ours, round_trip(replace(group, exchange=None), torch.float32, None), strict=True):
                torch.testing.assert_close(y, expected)
        registered = nccl_library.count(library, "ncclCommRegister")
        # Where the memory between hops has grown, what it was before is registered no more.
        assert nccl_library.count(library, "ncclCommDeregister") == registered - 1
        dist.barrier()
    return registered


def _trouble_in_a_node(library: str) -> tuple[str, float]:
    os.environ["FAKE_NCCL_QUIET"] = "1"
    communicator, started = _communicator(library, (0, 0, 1, 1)), time.monotonic()
    if dist.get_rank() == 1:
        communicator._local.abort("out of memory")
    with pytest.raises(CommunicationError) as caught:
        communicator.exchange(torch.ones(4, 1), [1] * 4, [1] * 4)
    seconds = time.monotonic() - started
    dist.barrier()
    return str(caught.value), seconds


def test_trouble_inside_a_node_reaches_the_others(library):
    for message, seconds in run_ranks(_trouble_in_a_node, 4, library):
        assert "out of memory" in message and seconds < 5


def test_equals_gloo_with_one_peer_in_every_other_node(library):
    # Numbers of rows are the same for all, and go through one call: of the rows' own messages one per other node.
    for peers, calls in run_ranks(_rows_alone, 4, library, (0, 0, 1, 1)):
        assert (peers, calls) == (1, 0)
    assert max(run_ranks(_random_exchanges, 4, library, (0, 0, 1, 1), 30)) > 1
    run_ranks(_random_exchanges, 6, library, (0, 0, 1, 1, 2, 2), 24)


def _rows_alone(library: str, hosts: tuple[int, ...]) -> tuple[int, int]:
    world, rank = dist.get_world_size(), dist.get_rank()
    with _communicator(library, hosts) as communicator:
        for _ in range(3):
            communicator.exchange(torch.ones(world * 2, 3), [2] * world, [2] * world)
        dist.barrier()
    sends = [nccl_library.count(library, f"sends to {peer}") for peer in range(world) if hosts[peer] != hosts[rank]]
    assert max(sends) == 3
    return sum(size > 0 for size in sends), nccl_library.count(library, "ncclAlltoAll")


def _with_fault(library: str, fault: str) -> tuple[str, str]:
    communicator = _communicator(library, (0, 0, 1, 1), 1.5, fault)
    x, rows, messages = torch.ones(200, 8), [50] * 4, []
    for _ in range(6):
        try:
            communicator.exchange(x, rows, rows)
        except CommunicationError as error:
            messages.append(str(error))
    communicator.close()
    return messages[0], messages[-1]


@pytest.mark.parametrize(
    "fault", first_by_day(["2:5:error", "3:4:exit", "1:3:hang"])
)  # in a first hop, in a second, in a second
def test_a_fault_in_either_hop_is_an_error_on_every_rank(library, tmp_path, fault):
    results = run_mortal_ranks(_with_fault, 4, str(tmp_path), library, fault)
    for rank, result in enumerate(results):
        if rank == 3 and "exit" in fault:
            assert result == 3
        else:
            assert "'ep' through NCCL by nodes" in result[0] or "through shared memory" in result[0], result


def _not_by_nodes(library: str, hosts: tuple[int, ...]) -> str:
    world = dist.get_world_size()
    with _communicator(library, hosts) as communicator:
        got = communicator.exchange(torch.arange(world), [1] * world, [1] * world)
        assert got.tolist() == [dist.get_rank()] * world
        dist.barrier()
        return type(communicator).__name__


@pytest.mark.parametrize("hosts", first_by_day([((0, 0, 1),), ((0, 0, 0),), ((0, 1, 0, 1),), ((0, 1, 2),)]))
def test_groups_without_even_nodes_exchange_in_one_hop(library, hosts):
    assert run_ranks(_not_by_nodes, len(hosts), library, hosts) == [NcclCommunicator.__name__] * len(hosts)


def test_nodes_that_do_not_fit_are_named():
    assert nodes_problem([0, 0, 2, 2]) == nodes_problem([0, 0, 0, 3, 3, 3]) == ""
    assert "one node" in nodes_problem([0, 0])
    for hosts in ([0, 1, 1], [0, 0, 1], [0, 1, 0, 1], [0, 0, 2, 2, 0, 0]):
        assert "equally many" in nodes_problem(hosts)


def _chosen(backend: str, by_nodes: bool, working: bool) -> str:
    if not working:
        shm_communicator._host_identity = lambda: (f"boot {dist.get_rank()}", "pid:[1]", 0)
    group = Group("ep", tuple(range(dist.get_world_size())), dist.get_rank(), dist.group.WORLD)
    try:
        return type(with_exchange(group, torch.device("cpu"), 30.0, backend, by_nodes).exchange).__name__
    except ConfigError as error:
        return str(error)
    finally:
        dist.barrier()  # a refusal takes no exchange: the other rank may not even have connected


def test_the_backend_is_the_one_asked_for_or_an_error():
    assert run_ranks(_chosen, 2, "auto", False, True) == ["ShmCommunicator"] * 2
    assert run_ranks(_chosen, 2, "extension", False, True) == ["ShmCommunicator"] * 2
    assert (
        run_ranks(_chosen, 2, "torch", False, True) == run_ranks(_chosen, 2, "auto", False, False) == ["NoneType"] * 2
    )
    assert all("cannot be had here" in message for message in run_ranks(_chosen, 2, "extension", False, False))
    assert all("needs CUDA" in message for message in run_ranks(_chosen, 2, "extension", True, True))
