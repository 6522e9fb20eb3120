"""The threads of a process that serves several models, divided among the engines that have work."""

from __future__ import annotations

import threading

import torch


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
