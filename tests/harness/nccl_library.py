"""The library with NCCL's interface over sockets and host memory, for tests of what is around NCCL."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import torch.distributed as dist

from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange.nccl_communicator import NcclCommunicator, create_nccl_communicator

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path, *options: str) -> str:
    """Compiles the library and returns its path; the option -DFAKE_NCCL_OLD leaves out what only newer releases have."""
    source, path = ROOT / "cpp_ext" / "testing" / "stand_ins" / "fake_nccl.cpp", folder / "libfakenccl.so"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread", str(source), "-o"]
    subprocess.run([*command, str(path), *options], check=True)
    return str(path)


def use(library: str, fault: str = "") -> None:
    """Makes this process take the library for NCCL; a fault is RANK:GROUP OF CALLS:KIND (fake_nccl.cpp has the kinds)."""
    os.environ["MEGATRON_SAMOE_NCCL_LIB"] = library
    os.environ.pop("FAKE_NCCL_FAULT", None)
    if fault:
        os.environ["FAKE_NCCL_FAULT"] = fault


def communicator(library: str, timeout_s: float = 30.0, fault: str = "") -> NcclCommunicator | None:
    """Returns a communicator of all ranks over the library."""
    use(library, fault)
    group = Group("ep", tuple(range(dist.get_world_size())), dist.get_rank(), dist.group.WORLD)
    return create_nccl_communicator(group, timeout_s, "cpu")


def count(library: str, what: str) -> int:
    """Returns how often this process has done something; fake_nccl.cpp has the names."""
    function = ctypes.CDLL(library).megatron_samoe_fake_nccl_count
    function.restype = ctypes.c_int64
    return int(function(what.encode()))
