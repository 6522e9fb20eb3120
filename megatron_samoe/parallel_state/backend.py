"""The process's device, communication backend and threads, and its part in a torchrun job."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.errors import CommunicationError, ConfigError, JobEndedError, MegatronSamoeError
from megatron_samoe.parallel_state import launcher
from megatron_samoe.parallel_state.meeting import Meeting
from megatron_samoe.parallel_state.rank_store import join_store
from megatron_samoe.parallel_state.silent_hosts import silent_hosts
from megatron_samoe.parallel_state.state import connecting_time
from megatron_samoe.start import die_with_torchrun

#: What torch says when communication fails where it raises a bare RuntimeError; elsewhere it is a DistError.
UNTYPED_FAILURES = re.compile(
    "|".join(
        (
            # gloo. Its own messages begin with the file of its source that made them, except that to the operations
            # that were under way when another one's time was up, which names nothing.
            "(?i:gloo)",
            "Application timeout caused pair closure",
            "Connection closed by peer",
            # The store while a group is made; waiting for an operation with a time-out; TORCH_DISTRIBUTED_DEBUG=DETAIL.
            "Wait timeout",
            "Timeout waiting for key",
            "Socket Timeout",
            "Operation timed out!",
            "monitoredBarrier",
            "Detected mismatch between collectives on ranks",
            # NCCL's result where torch.distributed calls torch.cuda.nccl: all-to-all, send and receive.
            r"NCCL Error \d",
            "NCCL timeout when waiting for nonblocking call",
            "NCCL communicator was aborted",
        )
    )
)

_Result = TypeVar("_Result")
#: How long a rank that leaves before the rendezvous tries to notify those of other hosts.
TELLING_S = 5.0


def choose_device(config: ParallelConfig) -> torch.device:
    """Returns the device of this rank: its own GPU with NCCL, else the CPU.

    Raises:
        ConfigError: the configuration asks for NCCL and no CUDA device is found, there are fewer than ranks of this host,
            or a GPU is there whose driver is older than torch's CUDA.
    """
    if config.distributed_backend == "gloo":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = _why_no_gpu()
        if config.distributed_backend == "nccl":
            raise ConfigError(
                "--distributed-backend", "nccl", f"needs a CUDA device; use gloo (or auto) on a CPU. {why}"
            )
        return torch.device("cpu")
    local_rank = launcher.local_rank()
    if local_rank >= torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise ConfigError(
            "--nproc-per-node",
            os.environ.get("LOCAL_WORLD_SIZE", "1"),
            f"must be at most the {torch.cuda.device_count()} CUDA devices of this host"
            + (f" that CUDA_VISIBLE_DEVICES = {visible} shows" if visible is not None else "")
            + "; --distributed-backend gloo trains on its CPU",
            collective=False,
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _why_no_gpu() -> str:
    """Returns why torch sees no GPU, as a sentence.

    Raises:
        ConfigError: there is one, and its driver is too old.
    """
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built for CPUs only."
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as failure:
        found = re.search(r"driver on your system is too old \(found version (\d+)\)", str(failure))
        if found is None:
            return str(failure).split(". ")[0].splitlines()[0] + "."
        version = f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}"
        raise ConfigError(
            "NVIDIA driver",
            version,
            f"is older than CUDA {torch.version.cuda}, which torch {torch.__version__} is built for: install a newer driver, "
            "or a torch for that CUDA; --distributed-backend gloo trains on the CPU",
            collective=False,
        ) from None
    return f"torch sees no GPU, with CUDA_VISIBLE_DEVICES = {os.environ.get('CUDA_VISIBLE_DEVICES')!r}."


def initialize_distributed(
    config: ParallelConfig,
    device: torch.device,
    num_ranks: int | None = None,
    facts: Mapping[str, str] | None = None,
) -> Meeting | None:
    """Joins torchrun's job, if this process is in one and has not joined; returns its part in the job's meetings, or
    None where there is nothing to join.

    Args:
        num_ranks: number of ranks that work together; all if not given. The others only take part in the rendezvous.
        facts: that must be equal on all ranks, by the words of a message.

    Raises:
        ConfigError: a host differs from the first in one of the facts.
        HostRefusedError: a host cannot take part in an elastic job, which continues without it.
        CommunicationError: torchrun's address variables are missing, the port is taken, or other ranks do not come.
    """
    world_size = launcher.world_size()
    if dist.is_initialized() or world_size == 1:
        return None
    die_with_torchrun()  # once more, for programs that import the package
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    rank = os.environ.get("RANK", "?")
    began = time.monotonic()
    try:
        store, number = join_store(timeout)
        meeting = Meeting(store, number, world_size, config.elastic and launcher.is_member())
        store = meeting.join(max(1.0, timeout.total_seconds() - (time.monotonic() - began)))
        meeting.compare(facts or {})
    except (JobEndedError, ConfigError):
        raise
    except (ValueError, OSError, RuntimeError, CommunicationError) as error:
        raise CommunicationError(
            f"Rank {rank} of {world_size} could not join the others at {address}: {str(error).splitlines()[0]}"
        ) from error
    num_ranks = num_ranks or world_size
    if number < num_ranks:
        _connect(config, device, meeting, store, number, num_ranks, timeout)
    return meeting


def _connect(
    config: ParallelConfig,
    device: torch.device,
    meeting: Meeting,
    store: dist.Store,
    rank: int,
    size: int,
    timeout: timedelta,
) -> None:
    """Makes the process group of all ranks, after their rendezvous at the store."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and config.moe_all_to_all_backend == "extension":
        # torch's communicators and ours overlap: on the device too, NCCL (2.26) then keeps the order of the program, which
        # is the same on all ranks. It reads this once, at its first launch.
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    # All ranks of a one-host job can talk over loopback even where the host's name does not resolve.
    if backend == "gloo" and launcher.local_world_size() == launcher.world_size():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    limit, began = connecting_time(size, timeout), time.monotonic()
    connect = partial(dist.init_process_group, backend, store=store, rank=rank, world_size=size, timeout=limit)
    try:
        _within(limit.total_seconds() + TELLING_S, connect)
        dist.distributed_c10d._set_pg_timeout(timeout)
    except (ValueError, RuntimeError) as error:
        # Of two ranks that cannot connect one may know at once, and the other when its time is up.
        left_s = limit.total_seconds() + 2 * TELLING_S - (time.monotonic() - began)
        problem = str(error).splitlines()[0]
        try:
            problem, lost = _within(left_s + TELLING_S, partial(meeting.compare_problems, problem, size, left_s))
        except RuntimeError:
            lost = ["the store of the job"]
        if lost:
            raise CommunicationError(
                f"Rank {rank} of {size} reached the others, and lost {', '.join(lost)} before {backend} had connected them: "
                f"{problem} {silent_hosts(meeting.hosts)}".rstrip()
            ) from error
        variable = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
        chosen = os.environ.get(variable)
        raise CommunicationError(
            f"Rank {rank} of {size} reached the others, but {backend} could not connect them: {problem} "
            f"{variable} names the network interface that ranks talk over: "
            + (f"it is {chosen!r}." if chosen else "it is not set, so the one of the host's name was taken.")
        ) from error


@contextlib.contextmanager
def telling_other_hosts() -> Iterator[None]:
    """Notifies ranks of other hosts, which would wait for this one, of a permanent fault before the rendezvous."""
    try:
        yield
    except (MegatronSamoeError, SystemExit) as error:
        if isinstance(error, MegatronSamoeError):
            permanent, message, error.collective = error.permanent, str(error), launcher.local_rank() > 0
        else:
            permanent, message = bool(error.code), "a flag is unknown or malformed, as its host's output says"
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if permanent and launcher.local_rank() == 0 and launcher.local_world_size() < size:
            with contextlib.suppress(ValueError, OSError, RuntimeError):  # nobody is there to be notified
                store, rank = join_store(timedelta(seconds=TELLING_S))
                Meeting(store, rank, size).stay_away(message)
                time.sleep(TELLING_S if rank == 0 else 0.0)  # since it holds the store
        raise


@contextlib.contextmanager
def shared_fate(meeting: Meeting | None) -> Iterator[None]:
    """Notifies the other ranks of a permanent fault in the block. If the block lost a rank to such a fault, raises that
    fault.

    Raises:
        JobEndedError: this rank lost others because one of them had a permanent fault.
        CommunicationError: this rank lost others for another reason.
    """
    try:
        yield
    except (MegatronSamoeError, RuntimeError) as error:
        lost = isinstance(error, CommunicationError) or (
            isinstance(error, RuntimeError) and is_communication_failure(error)
        )
        silent = silent_hosts(meeting.hosts) if meeting is not None and lost else ""
        if meeting is not None and lost and not isinstance(error, JobEndedError):
            _at_store(meeting.raise_if_ended)
        elif meeting is not None and isinstance(error, MegatronSamoeError):
            _at_store(partial(meeting.notify, error))
        if lost and isinstance(error, RuntimeError):
            raise CommunicationError(
                f"Another rank was lost: {str(error).splitlines()[0]} {silent}".rstrip()
            ) from error
        if silent:
            error.args = (f"{error} {silent}",)
        raise


def _at_store(action: Callable[[], None]) -> None:
    """Does something at a store that may be gone as well, or on a host that no longer answers; raises JobEndedError of it."""
    with contextlib.suppress(RuntimeError):
        _within(TELLING_S, action)


def _within(limit_s: float, action: Callable[[], _Result]) -> _Result:
    """Returns what an action does; RuntimeError where that takes longer, as it may where a host no longer answers."""
    results: list[_Result] = []
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            results.append(action())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0]
    if not results:
        raise RuntimeError(f"no answer came within {limit_s:.0f} s.")
    return results[0]


def leave_distributed() -> None:
    """Ends the process groups and their threads, which must stop before the interpreter does."""
    gc.collect()  # a cycle that holds a group would hold its threads
    dist.destroy_process_group()


def is_communication_failure(error: RuntimeError) -> bool:
    """Returns whether torch raised because another rank died, hung or could not be reached."""
    return isinstance(error, dist.DistError) or UNTYPED_FAILURES.search(str(error)) is not None


def set_num_threads(num_threads: int | None) -> int:
    """Sets the number of CPU threads of this process and returns it.

    Ranks that together use more threads than cores run at half speed: OpenMP barriers wait for descheduled threads.

    Args:
        num_threads: as configured; None for OMP_NUM_THREADS, or without that for the host's cores divided by its ranks.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    threads = num_threads or _omp_num_threads() or max(1, cores // launcher.local_world_size())
    torch.set_num_threads(threads)
    return threads


def _omp_num_threads() -> int | None:
    """Returns the number in OMP_NUM_THREADS; None where it has none, or torchrun may have set it."""
    given = re.match(r"\s*([1-9]\d*)", os.environ.get("OMP_NUM_THREADS", ""))
    if given is None or (given[1] == "1" and "LOCAL_WORLD_SIZE" in os.environ):
        return None  # torchrun sets 1 where nobody chose
    return int(given[1])


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory rather than return it to the system; returns whether that worked.

    Otherwise large tensors come as fresh pages each time, and page faults cost more than most operations on them. The
    price is that the process stays at its peak size. Programs call this at their start, never on import.
    """
    mmap_max, trim_threshold = -4, -1
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, 2**31 - 1))
