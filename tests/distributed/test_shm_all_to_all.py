from __future__ import annotations

import logging
import os
import platform
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.errors import CommunicationError
from megatron_samoe.log import logger
from megatron_samoe.ops import extension
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange import shm_communicator
from megatron_samoe.row_exchange.all_to_all import all_to_all_rows, exchange_counts
from megatron_samoe.row_exchange.shm_communicator import create_shm_communicator
from tests.harness.forbidden_calls import MEMFD_CREATE, PIDFD_OPEN, forbid
from tests.harness.mortal_ranks import run_mortal_ranks
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built"),
]


def _group(name: str = "ep") -> Group:
    world = dist.get_world_size()
    return Group(name, tuple(range(world)), dist.get_rank(), dist.group.WORLD)


def _communicator(timeout_s: float = 30.0):
    communicator = create_shm_communicator(_group(), timeout_s)
    assert communicator is not None
    return communicator


def _gloo(x, send_rows, receive_rows):
    received = x.new_empty((sum(receive_rows), *x.shape[1:]))
    dist.all_to_all_single(received, x, receive_rows, send_rows)
    return received


def _random_exchanges(num_exchanges: int) -> int:
    generator = torch.Generator().manual_seed(11)
    world, rank = dist.get_world_size(), dist.get_rank()
    dtypes = (torch.float32, torch.int64, torch.bfloat16, torch.uint8, torch.float64)
    with _communicator() as communicator:
        for exchange in range(num_exchanges):
            rows_WW = torch.randint(0, 300, (world, world), generator=generator)
            if exchange % 3 == 0:
                rows_WW[torch.rand(world, world, generator=generator) < 0.5] = 0
            if exchange % 7 == 0:
                rows_WW[:, exchange % world] = 0  # one rank receives nothing
            width = (1, 3, 64, 257)[exchange % 4]
            send, receive = rows_WW[rank].tolist(), rows_WW[:, rank].tolist()
            x = torch.randint(0, 255, (sum(send), width)).to(dtypes[exchange % len(dtypes)])
            got = communicator.exchange(x, send, receive)
            # gloo knows no bf16 alltoall in every release: compare the bytes
            expected = _gloo(x.view(torch.uint8), send, receive).view(x.dtype)
            assert got.dtype == x.dtype and torch.equal(got, expected), exchange
    return num_exchanges


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_equals_gloo(world_size):
    assert run_ranks(_random_exchanges, world_size, 60) == [60] * world_size


def _large_messages() -> None:
    """Far more than the rings hold, in both directions and in one only."""
    world, rank = dist.get_world_size(), dist.get_rank()
    with _communicator() as communicator:
        rows = 6_000 + 1
        x = torch.arange(world * rows * 257, dtype=torch.float32).view(world * rows, 257) + rank
        got = communicator.exchange(x, [rows] * world, [rows] * world)
        assert torch.equal(got, _gloo(x, [rows] * world, [rows] * world))
        # All to rank 0, which sends nothing.
        send = [0] * world if rank == 0 else [rows] + [0] * (world - 1)
        receive = [0] + [rows] * (world - 1) if rank == 0 else [0] * world
        got = communicator.exchange(x[: sum(send)], send, receive)
        assert torch.equal(got, _gloo(x[: sum(send)], send, receive))


@pytest.mark.parametrize("world_size", [2, 4])
def test_messages_larger_than_the_rings(world_size):
    run_ranks(_large_messages, world_size)


def _empty_and_odd_shapes() -> None:
    world = dist.get_world_size()
    with _communicator() as communicator:
        for shape in ((0, 5), (world, 0), (world,), (world, 2, 3), (0,)):
            x = torch.randn(shape)
            rows = [shape[0] // world] * world
            assert communicator.exchange(x, rows, rows).shape == x.shape
        strided = torch.randn(6, 2 * world).t()
        rows = [2] * world
        assert torch.equal(communicator.exchange(strided, rows, rows), _gloo(strided.contiguous(), rows, rows))


def test_empty_and_odd_shapes():
    run_ranks(_empty_and_odd_shapes, 2)


def _gradients() -> None:
    rank = dist.get_rank()
    rows_WW = torch.tensor([[2, 0, 3], [1, 4, 0], [5, 1, 1]])
    send, receive = rows_WW[rank].tolist(), rows_WW[:, rank].tolist()
    with _communicator() as communicator:
        x = torch.randn(sum(send), 4, requires_grad=True)
        group = replace(_group(), exchange=communicator)
        y = all_to_all_rows(x, send, receive, group)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert torch.equal(dx, _gloo(dy, receive, send))
        z = all_to_all_rows(y, receive, send, group)
        assert torch.equal(z, x)


def test_the_gradient_takes_the_way_back():
    run_ranks(_gradients, 3)


def _held() -> dict[str, int]:
    """What this process holds of the system."""
    time.sleep(0.05)  # the kernel's end of a thread comes a little after Python's
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "shared maps": sum("memfd:megatron_samoe" in line for line in maps),
        "maps": len(maps),
    }


def _many_communicators(num: int) -> tuple[dict[str, int], list[str]]:
    world = dist.get_world_size()
    for i in range(num):
        with _communicator() as communicator:
            rows, index = torch.ones(world, 1), torch.arange(world)
            communicator.exchange(rows, [1] * world, [1] * world)
            communicator.exchange_gathered(rows, index, 1, [1] * world, [1] * world)
            communicator.start(rows, [1] * world, [1] * world).wait()
            dist.barrier()
        if i == num // 4:
            before = _held()
    more = {name: count - before[name] for name, count in _held().items()}
    return more, [name for name in os.listdir("/dev/shm") if "samoe" in name]


@pytest.mark.parametrize("num", first_by_day([40, 1000]))
def test_nothing_leaks(num):
    for more, files in run_ranks(_many_communicators, 2, num, timeout_s=250):
        assert files == []
        assert more.pop("maps") < 8, "the heap has a few more, hundreds of groups none"
        assert more.pop("descriptors") <= 0, "one of before may have been closed meanwhile"
        assert more == {"threads": 0, "shared maps": 0}


def _forbidden(number: int) -> tuple[list[bool], list[str]]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    dist.barrier()
    if dist.get_rank() == 1:
        forbid(number)
    fallen = [create_shm_communicator(_group()) is None for _ in range(3)]
    assert exchange_counts(torch.arange(2)[:, None], _group()).flatten().tolist() == [dist.get_rank()] * 2
    return fallen, said


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter has x86-64's numbers")
@pytest.mark.parametrize("number, name", [(MEMFD_CREATE, "memfd_create"), (PIDFD_OPEN, "pidfd_open")])
def test_a_forbidden_system_call_makes_all_fall_back_and_is_told_once(number, name):
    for fallen, said in run_ranks(_forbidden, 2, number):
        assert fallen == [True] * 3
        assert len(said) == 1 and f"{name}: Operation not permitted" in said[0] and "through torch" in said[0]


def _error_of(function) -> str:
    with pytest.raises(CommunicationError) as caught:
        function()
    return str(caught.value)


def _disagreement_then_next() -> str:
    try:
        return _disagreement_with_barrier()
    finally:
        dist.barrier()


def _disagreement_with_barrier() -> str:
    rank = dist.get_rank()
    communicator = _communicator()
    receive = [1, 1] if rank == 0 else [3, 1]
    x = torch.ones(2, 4)

    def until_error():
        communicator.exchange(x, [1, 1], receive)  # rank 0 may finish this one
        communicator.exchange(x, [1, 1], [1, 1])

    message = _error_of(until_error)
    assert _error_of(lambda: communicator.exchange(x, [1, 1], [1, 1])) == message
    return message


def test_ranks_that_disagree_about_splits_are_told():
    first, second = run_ranks(_disagreement_then_next, 2)
    assert "sent 16 bytes" in second and "48 were expected" in second and "splits" in second
    assert "rank 1" in first and "gave up" in first


def _wrong_arguments() -> None:
    with _communicator() as communicator:
        with pytest.raises(ValueError, match="3 rows in 2 ranks"):
            communicator.exchange(torch.ones(3, 1), [1, 1], [1, 1])
        with pytest.raises(ValueError, match="3 rows in 2 ranks"):
            communicator.exchange(torch.ones(3, 1), [3], [3])
        # Refused before anything was sent: the communicator still works.
        assert communicator.exchange(torch.ones(2, 1), [1, 1], [1, 1]).sum() == 2
        dist.barrier()
    assert "closed" in _error_of(lambda: communicator.exchange(torch.ones(2, 1), [1, 1], [1, 1]))


def test_wrong_arguments_do_no_harm():
    run_ranks(_wrong_arguments, 2)


def _silent_peer() -> tuple[str, float]:
    communicator = _communicator(timeout_s=0.6)
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(1.5)
        return "", 0.0
    start = time.monotonic()
    message = _error_of(lambda: communicator.exchange(torch.ones(2, 4), [1, 1], [1, 1]))
    return message, time.monotonic() - start


def test_a_silent_peer_is_named_after_the_timeout():
    (message, seconds), _ = run_ranks(_silent_peer, 2)
    assert "nothing came from rank 1" in message and "0 of 16 bytes received" in message and "'ep'" in message
    assert 0.5 < seconds < 5


def _abort() -> str:
    communicator = _communicator()
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(0.2)
        communicator.abort("loss is not a number")
        dist.barrier()
        return _error_of(lambda: communicator.exchange(torch.ones(3, 1), [1, 1, 1], [1, 1, 1]))
    message = _error_of(lambda: communicator.exchange(torch.ones(3, 1), [1, 1, 1], [1, 1, 1]))
    dist.barrier()
    return message


def test_one_rank_gives_up_for_all():
    messages = run_ranks(_abort, 3)
    assert all("loss is not a number" in message for message in messages)


def _interrupted_in_background() -> tuple[str, float]:
    communicator, message = _communicator(60.0), ""
    x = torch.ones(2, 1 << 20)  # more than a ring holds, so that no rank ends without the other
    started = time.monotonic()
    if dist.get_rank() == 0:
        pending = communicator.start(x, [1, 1], [1, 1])
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            pending.wait()
        communicator.close()
        dist.barrier()
    else:
        dist.barrier()
        message = _error_of(lambda: communicator.exchange(x, [1, 1], [1, 1]))
    return message, time.monotonic() - started


def test_an_interrupt_ends_an_exchange_in_the_background():
    first, second = run_ranks(_interrupted_in_background, 2)
    assert max(first[1], second[1]) < 10 and "gave up: interrupted" in second[0]


def _close_early() -> str:
    communicator = _communicator()
    dist.barrier()
    if dist.get_rank() == 1:
        communicator.close()
        dist.barrier()
        return ""
    message = _error_of(lambda: communicator.exchange(torch.ones(2, 4), [1, 1], [1, 1]))
    dist.barrier()
    return message


def test_a_peer_that_closed_is_named():
    message, _ = run_ranks(_close_early, 2)
    assert "rank 1" in message and "closed the communicator" in message


def _dies(after_exchanges: int, how: str) -> tuple[str, float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    communicator = _communicator(timeout_s=20.0)
    x = torch.ones(world * 3000, 64)
    rows = [3000] * world
    dist.barrier()
    for exchange in range(after_exchanges + 50):
        if rank == 1 and exchange == after_exchanges:
            os.kill(os.getpid(), signal.SIGKILL) if how == "kill" else os._exit(3)
        start = time.monotonic()
        try:
            communicator.exchange(x, rows, rows)
        except CommunicationError as error:
            return str(error), time.monotonic() - start
    return "no error", 0.0


@pytest.mark.parametrize("world_size, after, how", [(2, 0, "kill"), (3, 5, "kill"), (4, 17, "exit")])
def test_survivors_of_a_killed_rank_hear_it_at_once(tmp_path, world_size, after, how):
    results = run_mortal_ranks(_dies, world_size, str(tmp_path), after, how)
    assert results[1] == (-signal.SIGKILL if how == "kill" else 3)
    for rank in set(range(world_size)) - {1}:
        message, seconds = results[rank]
        assert "rank 1" in message and ("has ended" in message or "gave up" in message), message
        assert seconds < 5


def _other_host() -> tuple[bool, bool]:
    if dist.get_rank() == 1:
        shm_communicator._host_identity = lambda: ("another boot", "pid:[1]", 0)
    return create_shm_communicator(_group()) is None, extension.available()


def test_ranks_that_are_alone_on_their_hosts_fall_back_together():
    assert run_ranks(_other_host, 2) == [(True, True)] * 2


def _one_without_extension() -> bool:
    if dist.get_rank() == 1:
        extension.load.cache_clear()
        os.environ[extension.ENVIRONMENT_VARIABLE] = "off"
    return create_shm_communicator(_group()) is None


def test_one_rank_without_the_extension_makes_all_fall_back():
    assert run_ranks(_one_without_extension, 2) == [True, True]


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


def _forked_child_is_refused() -> int:
    communicator = _communicator()
    child = os.fork()
    if child == 0:
        try:
            communicator.exchange(torch.ones(2, 1), [1, 1], [1, 1])
        except CommunicationError as error:
            os._exit(7 if "fork" in str(error) else 8)
        os._exit(9)
    _, status = os.waitpid(child, 0)
    # The parent is not disturbed by it.
    communicator.exchange(torch.ones(2, 1), [1, 1], [1, 1])
    return os.waitstatus_to_exitcode(status)


def test_a_fork_must_not_use_its_parents_communicator():
    assert run_ranks(_forked_child_is_refused, 2) == [7, 7]
