"""Where this process runs: device, communication backend, threads, and its part in a torchrun job."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.errors import CommunicationError, ConfigError

#: What other launchers call the number of processes that they started together.
FOREIGN_WORLD_SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def world_size_from_environment() -> int:
    """Returns the number of processes that torchrun started; 1 without torchrun.

    Raises:
        ConfigError: another launcher started several, which would all train alone and save to the same place.
    """
    if "WORLD_SIZE" not in os.environ:
        for name in FOREIGN_WORLD_SIZES:
            size = os.environ.get(name, "1")
            if size.isdigit() and int(size) > 1:
                raise ConfigError(name, int(size), "ranks find each other through torchrun's variables, which are not set: "
                                  "start one torchrun per node (examples/pretrain_slurm.sh), or set WORLD_SIZE=1 where "
                                  "each process is to work alone")  # fmt: skip
    return int(os.environ.get("WORLD_SIZE", "1"))


def choose_device(config: ParallelConfig) -> torch.device:
    """Returns the device of this rank: its own GPU with NCCL, else the CPU.

    Raises:
        ConfigError: NCCL is demanded and there is no CUDA device.
    """
    wants_cuda = config.distributed_backend == "nccl" or (
        config.distributed_backend == "auto" and torch.cuda.is_available()
    )
    if not wants_cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("--distributed-backend", "nccl", "needs a CUDA device; use gloo (or auto) on a CPU")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"),
            f"must be at most the {torch.cuda.device_count()} CUDA devices of this host",
        )  # fmt: skip
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def initialize_distributed(config: ParallelConfig, device: torch.device) -> None:
    """Joins torchrun's job, if this process is in one and has not joined.

    Raises:
        CommunicationError: the variables that say where are missing, the port is taken, or other ranks do not come.
    """
    if dist.is_initialized() or world_size_from_environment() == 1:
        return
    die_with_launcher()
    backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "gloo":
        # All ranks of a one-host job can talk over loopback even where the host's name does not resolve.
        if int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == world_size_from_environment():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=config.distributed_timeout_minutes))
    except (ValueError, RuntimeError) as error:
        place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise CommunicationError(
            f"Rank {os.environ.get('RANK', '?')} of {world_size_from_environment()} could not join the others at {place}: "
            f"{str(error).splitlines()[0]}"
        ) from error


def die_with_launcher() -> None:
    """Makes Linux kill this process when the torchrun that started it ends, in whatever way.

    A rank that outlived a killed torchrun would train on beside the job that takes its place. Checkpoints are renamed
    when they are whole, so no moment is a bad one.
    """
    if not (sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ):
        return
    set_parent_death_signal, parent = 1, os.getppid()
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it ended just before
        os.kill(os.getpid(), signal.SIGKILL)


def is_communication_failure(error: RuntimeError) -> bool:
    """Whether torch raised because another rank died, hung or could not be reached."""
    return (
        isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "Connection closed by peer" in str(error)
    )


def set_num_threads(num_threads: int | None) -> int:
    """Sets CPU threads of this process and returns their number.

    Ranks that together use more threads than cores run at half speed: OpenMP barriers wait for descheduled threads.

    Args:
        num_threads: as configured; None for those of OMP_NUM_THREADS, else the host's cores divided by its ranks.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    threads = num_threads or _omp_num_threads() or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    return threads


def _omp_num_threads() -> int | None:
    """Returns what OMP_NUM_THREADS asks for; None where it asks for nothing, or torchrun may have set it."""
    given = re.match(r"\s*([1-9]\d*)", os.environ.get("OMP_NUM_THREADS", ""))
    if given is None or (given[1] == "1" and "LOCAL_WORLD_SIZE" in os.environ):
        return None  # torchrun sets 1 where nobody chose
    return int(given[1])


def keep_freed_memory() -> bool:
    """Lets glibc keep freed memory rather than return it to the system; returns whether it could be told so.

    Large tensors otherwise come as fresh pages each time, and page faults cost more than most operations on them. The
    price: the process stays at its peak size. For programs to call at their start, never on import.
    """
    mmap_max, trim_threshold = -4, -1
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, 2**31 - 1))
