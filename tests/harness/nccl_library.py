"""The library with NCCL's interface over sockets and host memory, for tests of what is around NCCL.

Its device runs behind the host, as a GPU does: an exchange's rows are there some time after it has returned. CPU tensors
have no stream that would wait for them, so here the host does, at the end of each exchange (`_finish`).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange import nccl_communicator
from megatron_samoe.row_exchange.communicator import SLICE_S
from megatron_samoe.row_exchange.nccl_communicator import NcclCommunicator, create_nccl_communicator
from tests.harness.compiled import ROOT, compile_one

_finish_on_the_device = NcclCommunicator._finish


def build(folder: Path, *options: str) -> str:
    """Compiles the library and returns its path. The option -DFAKE_NCCL_OLD leaves out what only newer releases have.

    It takes the place of CUDA's runtime as well, under that one's name.
    """
    source, path = ROOT / "cpp_ext" / "testing" / "stand_ins" / "fake_nccl.cpp", folder / "libfakenccl.so"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread", str(source)]
    compile_one([*command, "-Wl,-soname,libcudart.so", "-o", str(path), *options])
    return str(path)


def use(library: str, fault: str = "", host_waits: bool = True) -> None:
    """Makes this process take the library for NCCL and CUDA's runtime, and CPU tensors for a GPU's.

    Args:
        fault: RANK:GROUP OF CALLS:KIND (fake_nccl.cpp has the kinds).
        host_waits: whether the host awaits the rows; else an exchange returns memory that is not written yet, as on a GPU.
    """
    os.environ["MEGATRON_SAMOE_NCCL_LIB"] = library
    os.environ.pop("FAKE_NCCL_FAULT", None)
    if fault:
        os.environ["FAKE_NCCL_FAULT"] = fault
    NcclCommunicator.device_types = ("cuda", "cpu")
    NcclCommunicator._keep_until_done = _keep
    NcclCommunicator._finish = _finish if host_waits else _finish_on_the_device
    nccl_communicator.exchange_stream = lambda device: SimpleNamespace(cuda_stream=1)


def communicator(
    library: str, timeout_s: float = 30.0, fault: str = "", host_waits: bool = True
) -> NcclCommunicator | None:
    """Returns a communicator of all ranks over the library."""
    use(library, fault, host_waits)
    group = Group("ep", tuple(range(dist.get_world_size())), dist.get_rank(), dist.group.WORLD)
    return create_nccl_communicator(group, timeout_s, "cpu")


def synchronize(seconds: float = SLICE_S) -> bool:
    """Waits for what this thread must wait for before it reads; returns whether that has ended, or was aborted."""
    function = ctypes.CDLL(os.environ["MEGATRON_SAMOE_NCCL_LIB"]).megatron_samoe_stand_in_synchronize
    return bool(function(ctypes.c_double(seconds)))


def count(library: str, what: str) -> int:
    """Returns how often this process has done something; fake_nccl.cpp has the names."""
    function = ctypes.CDLL(library).megatron_samoe_stand_in_count
    function.restype = ctypes.c_int64
    return int(function(what.encode()))


def calls(library: str) -> tuple[int, ...]:
    """Returns how often this process made, finalized, destroyed and aborted a communicator."""
    return tuple(count(library, f"ncclComm{call}") for call in ("InitRankConfig", "Finalize", "Destroy", "Abort"))


def _finish(self: NcclCommunicator, exchange: int, state: str) -> str:
    return _finish_on_the_device(self, exchange, state) or self._in_slices("pending", _awaited)


def _awaited(handle: int, seconds: float) -> str:
    done = synchronize(seconds)
    problem = torch.ops.megatron_samoe.all_to_all_finish(handle, 0, 0.0)
    return problem if problem not in ("", "pending") else "" if done else "pending"


def _keep(self: NcclCommunicator, *tensors: torch.Tensor) -> None:
    self.__dict__.setdefault("_kept", []).extend(tensors)
