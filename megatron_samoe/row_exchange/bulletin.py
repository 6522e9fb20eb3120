"""Messages between the members of an NCCL communicator, through the process group's store.

NCCL does not notify the other ranks of one rank's abort: over NVLink or shared memory they would wait for their time-out.
So each rank has a thread that looks at its communicator and at a key of the store. A rank that failed or gave up writes
this there, and the others abort. During a long wait all ranks write in which exchange they are. So a time-out names the
ranks that did not come, and a rank that has left is an error at once.

One store serves the job. A look is one request until the first long wait, and at most REQUESTS_PER_LOOK ever after,
however large the group. In a job of W ranks a rank looks every look_s(W) = max(0.5, W / 1000) seconds. So a communicator
of every rank makes at most REQUESTS_PER_LOOK * W / look_s(W) requests a second: never more than 4000.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch.distributed import Store

from megatron_samoe.parallel_state.state import Group

REQUESTS_PER_LOOK = 4
MOST_LOOKS_PER_S = 1000  # of all ranks together
_LOOK_S = 0.5
_STORE_TIMEOUT_S = 5.0
_LONG = 3  # looks at the same exchange; after the first the others are asked, and they answer at their next


def look_s(num_ranks: int) -> float:
    """Returns the seconds between two looks of a rank, in a job of `num_ranks`: half a second, and more from 500 ranks on."""
    return max(_LOOK_S, num_ranks / MOST_LOOKS_PER_S)


class Bulletin:
    """The thread and the keys of one communicator.

    Args:
        name: of the communicator: the same on all members, and unique.
        handle: of the compiled communicator.
        timeout_s: the communicator's time-out; the thread looks several times within it.
    """

    def __init__(self, group: Group, name: str, handle: int, timeout_s: float):
        assert group.handle is not None
        self._board = _Board(group, name, handle)
        stop = threading.Event()
        # Its own arguments only, so that the bulletin may end while the thread runs.
        args = (self._board, stop, min(look_s(torch.distributed.get_world_size()), timeout_s / 8))
        thread = threading.Thread(target=_look_after, args=args, name=f"bulletin {group.name}", daemon=True)
        thread.start()
        # At exit as well: the interpreter ends threads that come back to it from compiled code with a crash.
        self._end = weakref.finalize(self, _end, self._board, stop, thread)

    def give_up(self, reason: str) -> str:
        """Notifies the other members that this one gave up, unless one of them gave up first.

        Returns what to add to the reason: the ranks that did not come to the exchange, if they are known.
        """
        with self._board.while_it_stands():
            self._board.give_up(reason)
        return self._board.missing

    def close(self) -> None:
        """Notifies the other members that this one takes no part in later exchanges."""
        self._end()


class _Board:
    """The keys as one member uses them, while_it_stands()."""

    def __init__(self, group: Group, name: str, handle: int):
        assert group.handle is not None
        # A question to a store that does not answer may have no end, whatever the time-out, and holds its connection. What
        # is said awaits no answer: it has a connection of its own, so that nobody who gives up waits for the thread.
        self._asking, self._telling = (_connection(group, f"exchange/{name}") for _ in range(2))
        self._rank, self._size, self._handle = group.rank, group.size, handle
        self._pid, self._gone = os.getpid(), False
        self._many_at_once: bool = self._asking.has_extended_api()  # type: ignore[attr-defined]  # missing from torch's stubs
        self._report_keys = [str(rank) for rank in range(self._size)]  # the keys at which ranks say where they are
        self._all_have_reported = self._said = False
        self._announced = -1  # the exchange that the others know this rank to be in
        self._waiting, self._looks = -1, 0
        self.missing = ""
        self._telling.set(str(self._rank), "")

    @contextlib.contextmanager
    def while_it_stands(self) -> Iterator[None]:
        """Ends the messages when the store or communicator is gone (RuntimeError, ValueError); time-outs remain."""
        try:
            yield
        except (RuntimeError, ValueError):
            self._gone = True

    def look(self) -> bool:
        """Looks at the communicator and at the others' messages; returns whether to look again."""
        started, waiting, error = torch.ops.megatron_samoe.nccl_position(self._handle)
        if error:
            self.give_up(error)
            return False
        news = self._asking.check(["news"])
        if news and self._asking.check(["gave up"]):
            return self._abort(started, self._asking.get("gave up").decode())
        self._looks = self._looks + 1 if waiting == self._waiting else 0
        self._waiting = waiting
        waits = waiting >= 0 and self._looks > 0
        if waits and not news:
            self._telling.set("news", "where are you")
        if started != self._announced and (waits or news):
            self._telling.set(str(self._rank), str(started))
            self._announced = started
        if not waits:
            self.missing = ""
            return True
        return self._look_for_others(started, waiting)

    def _look_for_others(self, started: int, waiting: int) -> bool:
        if not self._all_have_reported:  # a question for one that is not there yet would wait for it
            self._all_have_reported = self._asking.check(self._report_keys)
            return True
        absent = []
        for rank, report in enumerate(self._read(self._report_keys)):
            exchange, *left = report.split() or ["-1"]
            if rank == self._rank or int(exchange) >= waiting:
                continue
            if left:
                return self._abort(started, f"rank {rank} closed the communicator after exchange {exchange}")
            absent.append(f"{rank} (last in {exchange})" if report else f"{rank} (says nothing)")
        known = absent and self._looks >= _LONG
        self.missing = f"; in exchange {waiting} these ranks are missing: {', '.join(absent)}" if known else ""
        return True

    def _read(self, keys: list[str]) -> list[str]:
        if self._many_at_once:
            return [value.decode() for value in self._asking.multi_get(keys)]  # type: ignore[attr-defined]
        return [self._asking.get(key).decode() for key in keys]

    def _abort(self, started: int, reason: str) -> bool:
        self._said = True  # by the other
        reason = f"rank {self._rank} of {self._size}, exchange {started}: {reason}"
        torch.ops.megatron_samoe.all_to_all_abort(self._handle, reason)
        return False

    def give_up(self, reason: str) -> None:
        if self._said or self._gone or os.getpid() != self._pid:
            return
        self._said = True
        self._telling.set("gave up", f"rank {self._rank} gave up: {reason}{self.missing}")
        self._telling.set("news", "gave up")

    def leave(self) -> None:
        if not self._gone and os.getpid() == self._pid:
            until = time.monotonic() + _STORE_TIMEOUT_S
            started, waiting, error = torch.ops.megatron_samoe.nccl_position(self._handle)
            while waiting >= 0 and not error and time.monotonic() < until:
                time.sleep(0.02)
                started, waiting, error = torch.ops.megatron_samoe.nccl_position(self._handle)
            # An exchange that has not ended by now ends with the communicator, for all.
            self._telling.set(str(self._rank), f"{started if waiting < 0 else waiting - 1} left")


def _connection(group: Group, prefix: str) -> Store:
    store = group.handle.get_group_store().clone()  # type: ignore[union-attr]  # missing from torch's stubs
    store.set_timeout(timedelta(seconds=_STORE_TIMEOUT_S))
    return torch.distributed.PrefixStore(prefix, store)


def _look_after(board: _Board, stop: threading.Event, interval_s: float) -> None:
    with board.while_it_stands():
        while not stop.wait(interval_s) and board.look():
            pass


def _end(board: _Board, stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():  # which may be the one that collects garbage
        thread.join(2 * _STORE_TIMEOUT_S)
    with board.while_it_stands():
        board.leave()
