"""The one thread that calls the engine. Others put commands into its inbox and hear of what happened.

In a layout of several ranks the engine wants the same calls in the same order everywhere: rank 0's worker sends its
commands to the others before every step, and `follow` carries them out there.
"""

from __future__ import annotations

import pickle
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch

from megatron_samoe.errors import ConfigError
from megatron_samoe.inference.engine import Engine
from megatron_samoe.inference.request import Request, TokenEvent
from megatron_samoe.log import logger
from megatron_samoe.parallel_state.state import Group

#: An idle leader says so from time to time, or the other ranks' wait would end in a time-out of the process group.
IDLE_S = 5.0


class Command(NamedTuple):
    """A call to the engine; a ticket is the asker's number of a request."""

    kind: Literal["submit", "cancel", "stop"]
    ticket: int = -1
    request: Request | None = None


class Ended(NamedTuple):
    """A request that gives no more tokens, for another reason than that it is complete."""

    ticket: int
    error: ConfigError | None


#: A token's request_id is the ticket. A request's last notice is an `Ended` or a token with a finish_reason.
Notice: TypeAlias = TokenEvent | Ended


@dataclass(frozen=True)
class Load:
    """How busy the engine is after a step."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_tokens: int = 0
    step_time_s: float = 0.0


class Desk:
    """Carries commands out on one rank's engine, which knows a request by its ticket."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.stopped = False

    def apply(self, commands: Sequence[Command]) -> list[Notice]:
        """Carries out commands in order; returns an end for each request that is refused or cancelled."""
        notices: list[Notice] = []
        for command in commands:
            if command.kind == "stop":
                self.stopped = True
            elif command.kind == "submit":
                assert command.request is not None
                try:
                    self.engine.submit(command.request, command.ticket)
                except ConfigError as error:
                    notices.append(Ended(command.ticket, error))
            elif self.engine.cancel(command.ticket):  # else it was complete before the news came
                notices.append(Ended(command.ticket, None))
        return notices


class EngineWorker:
    """Steps an engine in a thread of its own until it is stopped.

    Args:
        group: all ranks of the layout; this is the first.
        publish: gets the notices of a step and the load after it. It is called in the worker's thread, so it must only
            pass them on.
        fail: called once, in the worker's thread, if the engine fails; nothing follows.
        shares: of the process's threads among its engines.
    """

    def __init__(
        self,
        engine: Engine,
        group: Group,
        publish: Callable[[list[Notice], Load], None],
        fail: Callable[[BaseException], None],
        shares: ThreadShares,
    ):
        self._desk, self._group, self._publish, self._fail = Desk(engine), group, publish, fail
        self._shares = shares
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def send(self, command: Command) -> None:
        """Puts a command into the inbox; any thread may."""
        self._inbox.put(command)

    def stop(self, timeout_s: float) -> bool:
        """Ends the thread after its step, and the other ranks' loops; returns whether it ended in time."""
        if self._thread.is_alive():
            self._inbox.put(Command("stop"))
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        engine = self._desk.engine
        try:
            while not self._desk.stopped:
                commands = self._collect()
                share_commands(commands, self._group)
                notices = self._desk.apply(commands)
                started = time.perf_counter()
                had_work = engine.has_work and not self._desk.stopped
                if had_work:
                    self._shares.take(self)
                    notices += engine.step()
                if not engine.has_work:
                    self._shares.leave(self)
                if notices or had_work:
                    took_s = time.perf_counter() - started
                    self._publish(notices, Load(engine.num_running, engine.num_waiting, engine.num_free_tokens, took_s))
        except BaseException as error:  # whatever it is, requests wait for an answer
            logger.exception("the engine cannot continue")
            self._fail(error)

    def _collect(self) -> list[Command]:
        """Returns what is in the inbox; where the engine is idle, waits for something a while."""
        commands = []
        try:
            if not self._desk.engine.has_work:
                commands.append(self._inbox.get(timeout=IDLE_S))
            while True:
                commands.append(self._inbox.get_nowait())
        except queue.Empty:
            return commands


def follow(engine: Engine, group: Group) -> None:
    """Does on this rank what the first rank's worker does, until that is stopped."""
    desk = Desk(engine)
    while not desk.stopped:
        desk.apply(receive_commands(group))
        if engine.has_work and not desk.stopped:
            engine.step()


def share_commands(commands: Sequence[Command], group: Group) -> None:
    """Sends commands to the other ranks, which call `receive_commands`; all ranks of the group take part."""
    if group.size == 1:
        return
    device = _device(group)
    content = pickle.dumps(list(commands)) if commands else b""
    group.broadcast(torch.tensor([len(content)], dtype=torch.int64, device=device))
    if content:
        group.broadcast(torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device))


def receive_commands(group: Group) -> list[Command]:
    """Returns what the first rank shares."""
    device = _device(group)
    length = int(group.broadcast(torch.zeros(1, dtype=torch.int64, device=device)))
    if length == 0:
        return []
    content = group.broadcast(torch.zeros(length, dtype=torch.uint8, device=device))
    return pickle.loads(bytes(content.cpu().numpy()))


def _device(group: Group) -> torch.device:
    """Returns where a tensor must be to travel over the group."""
    backend = torch.distributed.get_backend(group.handle)
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


class ThreadShares:
    """Gives each engine's thread its share: all of them while no other engine works.

    torch keeps a number of threads for each thread that computes, and our kernels ask torch.
    """

    def __init__(self, num_threads: int | None = None):
        self._num_threads = num_threads or torch.get_num_threads()
        self._working: list[object] = []
        self._lock = threading.Lock()

    def take(self, engine: object) -> int:
        """Has the calling thread compute on the share of its engine, which works from now on; returns the share."""
        with self._lock:
            if engine not in self._working:
                self._working.append(engine)
            share, left = divmod(self._num_threads, len(self._working))
            share = max(1, share + (self._working.index(engine) < left))
        if torch.get_num_threads() != share:
            torch.set_num_threads(share)
        return share

    def leave(self, engine: object) -> None:
        """Leaves the share of an engine that has no work to the others."""
        with self._lock:
            if engine in self._working:
                self._working.remove(engine)
