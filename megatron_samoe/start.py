"""The first thing that any program here does: before torch is imported, which takes seconds and reads the environment.

`megatron_samoe/__init__.py` calls `prepare` where Python was started as `python -m megatron_samoe...`, files of tools/ do
so through `run`. A library that imports the package is not changed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import NoReturn

#: Turns that a thread of libgomp waits for the others before it sleeps, where nobody chose (OMP_WAIT_POLICY or
#: GOMP_SPINCOUNT). libgomp's own choice is 300,000, some 5 ms: a team that waits so long for a member whose core is busy
#: with something else keeps that core from it. docs/cluster.md has what was measured.
SPINS = 3_000


def prepare() -> None:
    """Sets what torch's libraries read when they are loaded, makes Ctrl-C end with one line from here on, and ties a rank
    to the torchrun that started it.
    """
    die_with_torchrun()
    if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "200")  # the last collectives, for training/hang_watch.py
    if sys.stderr is not None:
        faulthandler.enable()
    sys.excepthook = _end_quietly


def die_with_torchrun() -> None:
    """Makes Linux kill this process when the torchrun that started it ends, however it ends.

    A rank that outlives a killed torchrun would train on next to the job that replaces it. Killing a rank at any moment
    is safe, because checkpoints are renamed only when they are complete. Programs call this first of all: loading torch
    takes seconds, in which the parent may go, and whoever asks later sees process 1 instead.
    """
    if not (sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ):
        return
    from megatron_samoe.children import end_with  # whose ctypes only ranks need to load

    end_with(os.getppid(), signal.SIGKILL)


def run(module: str) -> NoReturn:
    """Runs main() of a module as the program, and leaves with what it returns."""
    prepare()
    with importing():
        program = importlib.import_module(module)
    sys.exit(program.main())


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """A time in which a program imports its modules. What they make stays, torch's hundred thousands of objects too, so Python
    is not to look for garbage among them, now or later: that takes a third of a short program's time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _end_quietly(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Says in one line that the user interrupted, and ends of the signal, as a shell expects; else as Python does."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    print("interrupted", file=sys.stderr, flush=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
