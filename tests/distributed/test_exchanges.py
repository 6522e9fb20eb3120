"""What every transport of rows must do: the rows of gloo, in order, and an error in time on every rank when one fails."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.errors import CommunicationError
from tests.harness import nccl_library
from tests.harness.exchanges import Transport, error_of, through_torch
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks
from tests.harness.tables import table

pytestmark = pytest.mark.distributed
TABLE = table(__file__)
DTYPES = (torch.float32, torch.int64, torch.bfloat16, torch.uint8, torch.float64)


def over(*transports: str) -> Any:
    """Runs a test with each of these transports."""
    return pytest.mark.parametrize("transport", transports, indirect=True)


def on_ranks(function: Any, transport: Transport, *args: Any, **options: Any) -> list[Any]:
    return run_ranks(function, transport.world_size, transport, *args, **options)


def _random_exchanges(transport: Transport, num_exchanges: int) -> str:
    """Gathered and ordinary exchanges of any sizes; which are gathered differs from rank to rank."""
    world, rank = dist.get_world_size(), dist.get_rank()
    shared, own = torch.Generator().manual_seed(3), torch.Generator().manual_seed(rank)
    with transport.open() as communicator:
        for exchange in range(num_exchanges):
            # Some are larger than the rings of shared memory, in one direction only or in both.
            rows_WW = torch.randint(0, 3000 if exchange % 11 == 5 else 60, (world, world), generator=shared)
            if exchange % 3 == 0:
                rows_WW[torch.rand(world, world, generator=shared) < 0.5] = 0
            if exchange % 7 == 0:
                rows_WW[:, exchange % world] = 0  # a rank that receives nothing
            if exchange % 7 == 3:
                rows_WW[:] = 0 if exchange % 2 else 4
            send, receive = rows_WW[rank].tolist(), rows_WW[:, rank].tolist()
            shape, topk = (max(1, sum(send)), (1, 3, 64, 257)[exchange % 4]), 1 + exchange % 2
            x = torch.randint(0, 255, shape, generator=own).to(DTYPES[exchange % len(DTYPES)])
            index = torch.randint(0, topk * x.shape[0], (sum(send),), generator=own)
            rows = x[index // topk]
            if x.dtype in (torch.float32, torch.bfloat16) and torch.rand(1, generator=own) < 0.6:
                got = communicator.exchange_gathered(x, index, topk, send, receive)
            else:
                got = communicator.exchange(rows, send, receive)
            assert got.dtype == x.dtype and torch.equal(got, through_torch(rows, send, receive)), exchange
        if transport.kind == "nodes" and len(set(transport.hosts)) > 1:
            # Where the memory between hops has grown, what it was before is registered no more.
            registered = nccl_library.count(transport.library, "ncclCommRegister")
            assert nccl_library.count(transport.library, "ncclCommDeregister") == max(registered - 1, 0)
        dist.barrier()
        return type(communicator).__name__


@pytest.mark.parametrize(("transport", "name"), first_by_day(TABLE["equal"], 12), indirect=["transport"])
def test_exchanges_equal_gloo(transport: Transport, name: str) -> None:
    assert on_ranks(_random_exchanges, transport, 40) == [name] * transport.world_size


def _odd_shapes_and_wrong_arguments(transport: Transport) -> None:
    with transport.open() as communicator:
        for shape in ((0, 5), (2, 0), (2,), (2, 2, 3), (0,)):
            rows = [shape[0] // 2] * 2
            assert communicator.exchange(torch.randn(shape), rows, rows).shape == shape
        strided = torch.randn(6, 4).t()
        assert torch.equal(communicator.exchange(strided, [2, 2], [2, 2]), through_torch(strided, [2, 2], [2, 2]))
        x, index = torch.ones(4, 2), torch.arange(4)
        for wrong, send, receive, said in (
            (x[:3], [1, 1], [1, 1], "3 rows in 2 ranks"),
            (x[:3], [3], [3], "3 rows in 2 ranks"),
            (x, [5, -1], [2, 2], "none may be negative"),
            (x.to("meta"), [2, 2], [2, 2], "x is on meta"),
            (x.to_sparse(), [2, 2], [2, 2], "dense rows"),
        ):
            with pytest.raises(ValueError, match=said):
                communicator.exchange(wrong, send, receive)
        for wrong_index, said in ((index + 1, "outside 0 to 3"), (index.int(), "not Long")):
            with pytest.raises(RuntimeError, match=said):
                communicator.exchange_gathered(x, wrong_index, 1, [2, 2], [2, 2])
        # Refused before anything was sent: the communicator still works.
        assert torch.equal(communicator.exchange_gathered(x, index, 1, [2, 2], [2, 2]), x)
        dist.barrier()


@over("shm 00", "nccl 00")
def test_shapes_may_be_odd_and_wrong_arguments_do_no_harm(transport: Transport) -> None:
    on_ranks(_odd_shapes_and_wrong_arguments, transport)


def _in_the_background(transport: Transport) -> int:
    world, threads = dist.get_world_size(), len(os.listdir("/proc/self/task"))
    with transport.open() as communicator:
        more_threads = len(os.listdir("/proc/self/task")) - threads
        tensors = [torch.randn(world * 500 * (i + 1), 64) for i in range(5)]
        splits = [[500 * (i + 1)] * world for i in range(5)]
        out = torch.empty_like(tensors[3])
        pending = [
            communicator.start(x, rows, rows, out if i == 3 else None)
            for i, (x, rows) in enumerate(zip(tensors, splits, strict=True))
        ]
        between = communicator.exchange(tensors[0], splits[0], splits[0])  # after those that were started
        for i in (3, 0, 1, 4, 2, 2):  # in any order, and again
            assert torch.equal(pending[i].wait(), through_torch(tensors[i], splits[i], splits[i]))
        assert pending[3].wait().data_ptr() == out.data_ptr()
        assert torch.equal(between, pending[0].wait())
        if transport.kind == "nccl":
            assert len(os.listdir("/proc/self/task")) == threads + more_threads, "an exchange takes no thread"
        dist.barrier()
        if transport.kind == "shm" and dist.get_rank() == 0:
            communicator._worker.submit(time.sleep, 0.2)  # so that one rank closes before it has begun what it started
        left = communicator.start(tensors[0], splits[0], splits[0])
        dist.barrier()
    if transport.kind == "shm":
        assert torch.equal(left.wait(), between)
    else:
        assert "is closed" in error_of(left.wait)
    return more_threads


@over("shm 000", "shm 001", "nccl 000", "nodes 0011")
def test_exchanges_in_the_background_keep_their_order(transport: Transport) -> None:
    more_threads = on_ranks(_in_the_background, transport)
    if transport.kind == "nccl":
        assert more_threads == [3] * 3  # the watchdog, the bulletin and the library's stream


def _held() -> dict[str, int]:
    """Returns what this process holds of the system."""
    time.sleep(0.05)  # the kernel's end of a thread comes a little after Python's
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "shared maps": sum("memfd:megatron_samoe" in line for line in maps),
        "maps": len(maps),
        "resident pages": int(Path("/proc/self/statm").read_text().split()[1]),
    }


def _many_communicators(transport: Transport, num: int) -> tuple[dict[str, int], list[str]]:
    world = dist.get_world_size()
    x, index, rows = torch.ones(4096 * world, 64), torch.arange(4096 * world), [4096] * world
    for i in range(num):
        with transport.open() as communicator:
            communicator.exchange(x, rows, rows)
            communicator.exchange_gathered(x, index, 1, rows, rows)
            communicator.start(x, rows, rows).wait()
            dist.barrier()
        if i == num // 4:
            before = _held()
    if transport.kind == "nccl":
        assert nccl_library.calls(transport.library) == (num, num, num, 0)
    more = {name: count - before[name] for name, count in _held().items()}
    return more, [name for name in os.listdir("/dev/shm") if "samoe" in name]


@pytest.mark.parametrize(
    ("transport", "num"),
    first_by_day([("nccl 00", 6), ("nccl 0000", 6), ("shm 00", 40), ("shm 00", 1000)], 3),
    indirect=["transport"],
)
def test_a_closed_communicator_leaves_nothing(transport: Transport, num: int) -> None:
    for more, files in on_ranks(_many_communicators, transport, num, timeout_s=600):
        assert files == []
        assert more.pop("maps") < 8, "the heap has a few more, hundreds of groups none"
        assert more.pop("resident pages") < 1024 or transport.kind == "nccl"  # whose stand-in is slow to give back
        assert more.pop("descriptors") <= 0, "one of before may have been closed meanwhile"
        assert more == {"threads": 0, "shared maps": 0}


def _fork(transport: Transport) -> tuple[str, int]:
    x, rows = torch.ones(2, 1), [1, 1]
    with transport.open() as communicator:
        communicator.exchange(x, rows, rows)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, error_of(lambda: communicator.exchange(x, rows, rows)).encode())
            communicator.close()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        communicator.exchange(x, rows, rows)  # which the child has left as it was
        dist.barrier()
    if transport.kind == "nccl":
        assert nccl_library.calls(transport.library) == (1, 1, 1, 0)
    return os.read(read, 1000).decode(), status


@over("shm 00", "nccl 00")
def test_a_fork_may_only_close_its_parents_communicator(transport: Transport) -> None:
    for message, status in on_ranks(_fork, transport):
        assert "fork" in message and status == 0


def _open_quietly(transport: Transport, timeout_s: float, fault: str = "") -> Any:
    """Returns a communicator after a first exchange, where ranks hear of each other's end by what we tell them only."""
    os.environ["FAKE_NCCL_QUIET"] = "1"
    communicator = transport.open(timeout_s, fault)
    _exchange(communicator)
    return communicator


def _exchange(communicator: Any, columns: int = 1) -> torch.Tensor:
    world = dist.get_world_size()
    return communicator.exchange(torch.ones(world, columns), [1] * world, [1] * world)


def _failed(communicator: Any, columns: int = 1) -> tuple[str, float]:
    """Returns the error of an exchange, which the communicator then repeats, and the seconds to it."""
    started = time.monotonic()
    message = error_of(lambda: _exchange(communicator, columns))
    seconds = time.monotonic() - started
    assert error_of(lambda: _exchange(communicator)) == message
    return message, seconds


def _one_aborts(transport: Transport) -> tuple[str, float]:
    communicator = _open_quietly(transport, 30.0)
    if dist.get_rank() == 1:
        time.sleep(0.2)
        communicator.abort("loss is not a number")
    found = _failed(communicator)
    world = dist.get_world_size()
    assert error_of(lambda: communicator.start(torch.ones(world, 1), [1] * world, [1] * world).wait()) == found[0]
    dist.barrier()
    communicator.close()
    assert "is closed" in error_of(lambda: _exchange(communicator))
    return found


def _one_closes(transport: Transport, timeout_s: float = 30.0) -> tuple[str, float]:
    communicator, found = _open_quietly(transport, timeout_s), ("", 0.0)
    if dist.get_rank() != 1:
        found = _failed(communicator)
    elif timeout_s == 30.0:
        communicator.close()
    dist.barrier()
    return found


def _one_is_silent(transport: Transport) -> tuple[str, float]:
    return _one_closes(transport, timeout_s=2.0)


def _one_expects_more(transport: Transport) -> tuple[str, float]:
    communicator = transport.open()
    receive = [1, 1] if dist.get_rank() == 0 else [3, 1]

    def until_it_fails() -> None:
        communicator.exchange(torch.ones(2, 4), [1, 1], receive)  # which rank 0 may finish
        _exchange(communicator)

    started, message = time.monotonic(), error_of(until_it_fails)
    dist.barrier()
    return message, time.monotonic() - started


#: What goes wrong, over which transports, and what ranks but 1 and rank 1 hear; "" for a rank that hears nothing.
TROUBLE: list[tuple[Any, str, str, str]] = [
    (_one_aborts, "shm 000", "loss is not a number", "loss is not a number"),
    (_one_aborts, "nccl 0000", "exchange 2: rank 1 gave up: loss is not a number", "loss is not a number"),
    (_one_closes, "shm 00", "closed the communicator: 0 of 4 bytes", ""),
    (_one_closes, "nccl 0000", "exchange 2: rank 1 closed the communicator after exchange 1", ""),
    (_one_is_silent, "shm 00", "nothing came from rank 1", ""),
    (_one_is_silent, "nccl 0000", "in exchange 2 these ranks are missing: 1 (last in 1)", ""),
    (_one_expects_more, "shm 00", "gave up", "where 48 were expected: the ranks disagree about the splits"),
    (_one_expects_more, "nccl 00", "closed the connection", "sent 16 bytes, expected 48"),
]


@pytest.mark.parametrize(("trouble", "transport", "others", "own"), TROUBLE, indirect=["transport"])
def test_an_error_on_one_rank_reaches_the_others(trouble: Any, transport: Transport, others: str, own: str) -> None:
    for rank, (message, seconds) in enumerate(on_ranks(trouble, transport)):
        assert (own if rank == 1 else others) in message and seconds < 5, (rank, message)
        assert not message or "group 'ep' through" in message


def _interrupted(transport: Transport, where: str, fault: str) -> tuple[str, float]:
    """Rank 0 is interrupted as it waits for rank 1, which does not come; the messages are larger than a ring."""
    communicator = _open_quietly(transport, 60.0, fault)
    world, rank = dist.get_world_size(), dist.get_rank()
    x, rows, found = torch.ones(world, 1 << 20), [1] * world, ("", 0.0)
    if rank == 0:
        pending = communicator.start(x, rows, rows) if where == "wait" else None
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            if pending is not None:
                pending.wait()
            elif where == "start":
                communicator.start(x, rows, rows)
            else:
                communicator.exchange_evenly(x)
        found = "", time.monotonic() - started
    elif rank != 1:
        found = _failed(communicator, 1 << 20)
    dist.barrier()
    return found


@pytest.mark.parametrize(("transport", "where", "fault"), TABLE["interrupted"], indirect=["transport"])
def test_an_interrupt_ends_the_wait_for_a_rank_that_does_not_come(transport: Transport, where: str, fault: str) -> None:
    first, _absent, *others = on_ranks(_interrupted, transport, where, fault)
    assert 0.4 < first[1] < 2
    for message, seconds in others:
        assert "gave up: interrupted" in message and seconds < 5


def _ends_at_random(transport: Transport, seed: int, how: str) -> tuple[str, float]:
    world = dist.get_world_size()
    communicator = transport.open(20.0)
    x, index, rows = torch.ones(world * 2000, 256), torch.arange(world * 2000), [2000] * world
    dist.barrier()
    delay = float(torch.rand(1, generator=torch.Generator().manual_seed(seed))) * 0.08
    if dist.get_rank() == world - 1:
        end = (os.kill, (os.getpid(), signal.SIGKILL)) if how == "killed" else (os._exit, (3,))
        threading.Timer(delay, *end).start()
    while True:
        started = time.monotonic()
        try:
            communicator.exchange_gathered(x, index, 1, rows, rows)
            communicator.exchange(x, rows, rows)
        except CommunicationError as error:
            return str(error), time.monotonic() - started


def _deaths() -> Iterable[Any]:
    yield from (("shm 00", 1, "killed"), ("shm 0000", 2, "exits"), ("shm 001", 7, "killed"), ("shm 011", 7, "killed"))
    yield ("nccl 000", 3, "exits")
    yield from (("shm 000", seed, "killed") for seed in range(60))


@pytest.mark.parametrize(("transport", "seed", "how"), first_by_day(_deaths(), 9), indirect=["transport"])
def test_a_rank_that_ends_at_any_point_is_an_error_on_the_others(transport: Transport, seed: int, how: str) -> None:
    *others, last = on_ranks(_ends_at_random, transport, seed, how, may_die=True)
    assert last == (-signal.SIGKILL if how == "killed" else 3)
    on_one_host = transport.kind == "shm" and len(set(transport.hosts)) == 1
    for message, seconds in others:
        named = (
            f"rank {len(others)}" if on_one_host else "closed the connection" if transport.kind == "nccl" else "'ep'"
        )
        assert named in message and seconds < (5 if on_one_host else 15), message
    assert not [name for name in os.listdir("/dev/shm") if "samoe" in name]
