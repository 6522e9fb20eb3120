"""Programs that run beside each other for a study: paused, continued and ended together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from megatron_samoe import children


class Programs:
    """The programs of a study that run now.

    Args:
        idle: run only when nothing else wants to.
    """

    def __init__(self, idle: bool = True) -> None:
        self._idle = idle
        self._running: set[subprocess.Popen] = set()
        self._paused = self._ended = False
        self._lock = threading.Lock()

    def run(self, command: Sequence[str], output: IO[str]) -> int:
        """Runs a program to its end and returns its exit status; 130 for one that was not started any more."""
        with self._lock:
            if self._ended:
                return 130
            # In a session of its own, or a terminal's Ctrl-C would reach it twice, and the second ends it at once.
            process = children.start(
                command, idle=self._idle, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            self._running.add(process)
            if self._paused:
                self._signal(process, signal.SIGSTOP)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._running.discard(process)

    def pause(self, paused: bool) -> None:
        """Stops all programs where they are, or lets them go on."""
        with self._lock:
            if paused == self._paused:
                return
            self._paused = paused
            for process in self._running:
                self._signal(process, signal.SIGSTOP if paused else signal.SIGCONT)

    def end(self, at_once: bool = False) -> None:
        """Ends all programs, which save before they leave, and starts no more.

        Args:
            at_once: end them without leave to save.
        """
        with self._lock:
            self._ended = True
            for process in self._running:
                self._signal(process, signal.SIGKILL if at_once else signal.SIGTERM)
                self._signal(process, signal.SIGCONT)

    @staticmethod
    def _signal(process: subprocess.Popen, number: int) -> None:
        # Its whole group: a launcher has processes of its own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def pause_file(root: Path) -> Path:
    """Returns the file whose presence pauses the studies in a folder, on whatever machines they run."""
    return root / "paused"
