"""Programs that end when the one that started them does, however that ends: by itself, by a signal, by SIGKILL.

Whatever starts a program here starts it by `run` or `start` (a test holds this). The new process asks Linux to be signalled
when its parent ends, and then becomes the program. Linux means the thread that started it: a thread that starts a program
has to outlive it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def end_with(parent: int, number: signal.Signals) -> None:
    """Has Linux send this process a signal when its parent ends, and sends it now where that has ended already.

    Args:
        parent: the process that started this one, as that knows itself.
    """
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, int(number))
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
    """Runs a program to its end, as `subprocess.run` does; SIGTERM reaches it if this one ends before."""
    return subprocess.run(_tied(command, idle=False), **options)


def start(command: Sequence[str], *, idle: bool = False, **options: Any) -> subprocess.Popen[Any]:
    """Starts a program, as `subprocess.Popen` does; SIGTERM reaches it when this one ends.

    Args:
        idle: it runs only when nothing else wants to; to hold against other sessions this takes `start_new_session`.
    """
    return subprocess.Popen(_tied(command, idle), **options)


def _tied(command: Sequence[str], idle: bool) -> list[str]:
    # As a file and bare of site packages: it is there in 20 ms.
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), "19" if idle else "0", *command]


def _become(parent: str, nice: str, *command: str) -> None:
    """Ties this process to its parent and becomes a program."""
    end_with(int(parent), signal.SIGTERM)
    if nice != "0":
        os.setpriority(os.PRIO_PROCESS, 0, int(nice))
        # Linux shares the processors between sessions, by a priority of each session.
        if os.getsid(0) == os.getpid():
            with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as file:
                file.write(nice)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"error: {command[0]} cannot be started: {error.strerror}")


if __name__ == "__main__":
    _become(*sys.argv[1:])
