"""Runs a function on several rank processes inside one pytest function.

Processes come from a fork server that has torch and the package loaded, or one that has more, talk over gloo through a file
store, use one thread each, and bring back their results or the first failure's traceback.
"""

from __future__ import annotations

import functools
import linecache
import multiprocessing
import os
import pickle
import re
import reprlib
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

_context = multiprocessing.get_context("forkserver")
# What ranks and programs would import each for itself, which would be most of a short one's time: the first optimizer of a
# process imports torch._dynamo, a pool's lock scipy.optimize, and a test's module the tools of tests.
_LOADED = (
    "torch torch._dynamo torch.distributed.checkpoint torch.utils.tensorboard torch.distributed.run scipy.optimize "
    "megatron_samoe.cli.pretrain pytest hypothesis tests.harness.layout_training"
).split()
_context.set_forkserver_preload([*_LOADED, "tests.harness.frozen"])


@functools.cache
def _server(more: tuple[str, ...]) -> Any:
    """Returns a fork server that has more modules loaded."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload([*_LOADED, *more, "tests.harness.frozen"])
    return server


class RankFailure(AssertionError):
    """A rank raised, died or hung; the message has its traceback."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    more: tuple[str, ...] = (),
    may_die: bool = False,
) -> list[Any]:
    """Returns [function(*args) on rank r for r in range(world_size)], with torch.distributed initialized for more than
    one rank.

    Args:
        function: importable from its module; its result must be picklable.
        more: modules that a fork server of their own has loaded, where each rank would import them for seconds.
        may_die: whether a rank may die in it; its result is then its exit code, negative for a signal.

    Raises:
        RankFailure: with the traceback of the rank that failed first.
    """
    connect = _server(more).connect_to_new_process if more else forkserver.connect_to_new_process
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for rank in range(world_size):
            here, there = _context.Pipe()
            process = _context.Process(
                target=_rank_main,
                args=(function, rank, world_size, os.path.join(folder, "store"), there, timeout_s, not may_die, args),
            )
            with mock.patch.object(forkserver, "connect_to_new_process", connect):
                process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        try:
            return _collect(processes, pipes, time.monotonic() + timeout_s, may_die)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _collect(processes: list[Any], pipes: list[Connection], deadline: float, may_die: bool) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        open_pipes = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(open_pipes), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailure(f"ranks {sorted(open_pipes.values())} did not finish in time")
        for pipe in ready:
            rank = open_pipes[pipe]
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(5)
                ok, value = True, processes[rank].exitcode
                if not may_die:
                    raise RankFailure(f"rank {rank} died with exit code {value}") from None
            if not ok:
                raise RankFailure(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def told(error: BaseException) -> str:
    """Returns the traceback of an error, and the values of what a failed assertion names, which pytest shows of its own."""
    text = "".join(traceback.format_exception(error))
    if not isinstance(error, AssertionError) or error.__traceback__ is None:
        return text
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    named = re.findall(r"\w+", linecache.getline(frame.f_code.co_filename, line))
    values = {name: frame.f_locals[name] for name in dict.fromkeys(named) if name in frame.f_locals}
    return text + "".join(f"    {name} = {reprlib.repr(value)}\n" for name, value in values.items())


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    pipe: Connection,
    timeout_s: float,
    stay: bool,
    args: Any,
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        if world_size > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout_s),
            )
        # Plain pickle copies tensors; multiprocessing's own would share memory that dies with this process.
        end = pickle.dumps((True, function(*args)))
    except BaseException as error:
        end = pickle.dumps((False, told(error)))
    pipe.send_bytes(end)
    if stay:
        # Other ranks would take this one for dead: those that just failed with it, and a slow one that gloo has connected
        # but that has not seen it yet.
        pipe.poll(timeout_s)
    pipe.close()
    if dist.is_initialized():
        dist.destroy_process_group()
