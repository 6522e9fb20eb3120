"""The process's relation to torchrun: what torchrun passes to it, and when it is restarted."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

from megatron_samoe.errors import ConfigError

#: What other launchers call the number of processes that they started together.
FOREIGN_WORLD_SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def world_size() -> int:
    """Returns the number of processes that torchrun started; 1 without torchrun.

    Raises:
        ConfigError: another launcher started several processes, which would each train a model of its own and save to the same
            folder.
    """
    if "WORLD_SIZE" not in os.environ:
        for name in FOREIGN_WORLD_SIZES:
            size = os.environ.get(name, "1")
            if size.isdigit() and int(size) > 1:
                raise ConfigError(
                    name,
                    int(size),
                    "ranks find each other through torchrun's variables, which are not set: "
                    "start one torchrun per node (examples/pretrain_slurm.sh), or set WORLD_SIZE=1 where "
                    "each process is to work by itself",
                )
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Returns the rank that torchrun gave this process; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Returns this process's number among those of its host, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Returns the number of ranks of this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def has_other_hosts() -> bool:
    """Returns whether torchrun runs on other hosts too, each with ranks of its own."""
    return "TORCHELASTIC_RUN_ID" in os.environ and local_world_size() < world_size()


def is_again() -> bool:
    """Returns whether torchrun has started this job's ranks before, so that ranks of an earlier attempt may still be
    dying.
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def is_member() -> bool:
    """Returns whether ranks of this torchrun have trained in this job before: a host that comes has none."""
    mark = _mark()
    return mark is not None and mark.exists()


def become_member() -> None:
    """Notes that ranks of this torchrun train, for the ranks that it starts after these."""
    mark = _mark()
    if mark is not None and local_rank() == 0:
        with contextlib.suppress(OSError):  # of a full disk: other hosts can see who is new
            mark.touch()


def _mark() -> Path | None:
    """Returns a file in the folder that torchrun makes for itself, which its attempts share; None where it makes none."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # folder/attempt_N/local rank/error.json
    return Path(error_file).parents[2] / "trains" if error_file and Path(error_file).is_absolute() else None


def stop_torchrun_restarts() -> None:
    """Ends torchrun where it would start this process again, after an error that every attempt would hit.

    torchrun restarts after any status but 0, so only a signal stops it. The other ranks of this host get the signal,
    too.
    """
    left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) - int(
        os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    )
    # In a container torchrun may be process 1. Elsewhere on Linux no rank has that parent: it dies with its torchrun (start.py).
    started_by_torchrun = os.getppid() > 1 or sys.platform == "linux"
    if "TORCHELASTIC_RUN_ID" in os.environ and left > 0 and started_by_torchrun:
        print("torchrun is asked not to try again: this fault does not pass by itself", file=sys.stderr, flush=True)
        os.kill(os.getppid(), signal.SIGTERM)
