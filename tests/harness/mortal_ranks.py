"""Runs a function on rank processes of which some may die: what the survivors say is the result."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from typing import Any

from tests.harness import ranks


def run_mortal_ranks(function: Callable[..., Any], world_size: int, folder: str, *args: Any, timeout_s: float = 60.0):
    """Returns, for each rank, function(*args) or the exit code (a negative signal number) with which it died first.

    Args:
        function: importable from its module; a rank that dies in it is no failure of the test.
        folder: an empty folder for the ranks' store.
    """
    processes, pipes = [], []
    for rank in range(world_size):
        here, there = ranks._context.Pipe(duplex=False)
        process = ranks._context.Process(
            target=ranks._rank_main, args=(function, rank, world_size, f"{folder}/store", there, timeout_s, args)
        )
        process.start()
        there.close()
        processes.append(process)
        pipes.append(here)
    results: list[Any] = []
    try:
        deadline = time.monotonic() + timeout_s
        for process, pipe in zip(processes, pipes, strict=True):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                raise ranks.RankFailure("a rank did not finish in time")
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                process.join(5)
                ok, value = True, process.exitcode
            if not ok:
                raise ranks.RankFailure(value)
            results.append(value)
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()
