"""All-to-all through shared memory, for groups whose ranks run on one host.

A communicator belongs to one group and is made by all its ranks together. Where it cannot be made (no compiled
extension, several hosts or containers, system calls that a sandbox forbids), all ranks learn the same reason and
torch's process group does the work.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_samoe.ops import extension
from megatron_samoe.ops.communicator import Communicator, agreed
from megatron_samoe.parallel_state.state import Group

_SLICE_S = 0.25  # how long the compiled code works before Python may look at signals
_SPINS_WITH_OWN_CORE, _SPINS_ON_SHARED_CORES = 2000, 50


def _host_identity() -> tuple[str, str, int]:
    """Returns what two processes must share to open each other's memory: kernel boot, pid namespace, user."""
    return (
        Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        os.readlink("/proc/self/ns/pid"),
        os.geteuid(),
    )


def _num_spins(group_size: int) -> int:
    """Returns how often a wait may spin: other ranks need the core where there are more ranks than cores."""
    local_ranks = max(group_size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    cores = len(os.sched_getaffinity(0))
    return _SPINS_WITH_OWN_CORE if local_ranks <= cores else _SPINS_ON_SHARED_CORES


class ShmCommunicator(Communicator):
    """All-to-all between processes of one host; CPU tensors. An abort reaches every member."""

    transport = "shared memory"

    def _exchange_bytes(
        self, handle: int, x: Tensor, received: Tensor, send_bytes: list[int], recv_bytes: list[int]
    ) -> str:
        ops = torch.ops.megatron_samoe
        state: str = ops.shm_all_to_all(handle, x, received, send_bytes, recv_bytes, _SLICE_S, self.timeout_s)
        while state == "pending":
            try:
                state = ops.shm_run(handle, _SLICE_S, self.timeout_s)
            except BaseException:  # an interrupt between two slices leaves the exchange half done on all ranks
                self.abort("interrupted")
                raise
        return state

    def _abort(self, handle: int, reason: str) -> None:
        torch.ops.megatron_samoe.shm_abort(handle, reason)

    def _close(self, handle: int) -> None:
        torch.ops.megatron_samoe.shm_close(handle)


def create_shm_communicator(group: Group, timeout_s: float = 600.0) -> ShmCommunicator | None:
    """Returns the group's shared-memory communicator, or None on every rank where one rank cannot have it (said once).

    Collective: every member of the group calls it.

    Args:
        timeout_s: longest silence of a peer in an exchange.
    """
    if group.size == 1:
        return None
    handle, problem, identity, address = -1, "", ("", "", 0), ""
    if not extension.load():
        problem = "the compiled extension is not in use"
    else:
        try:
            identity = _host_identity()
            handle = torch.ops.megatron_samoe.shm_create(group.rank, group.size, _num_spins(group.size))
            address = torch.ops.megatron_samoe.shm_address(handle)
        except (OSError, RuntimeError) as error:
            problem = str(error)
    members = group.all_gather_object((problem, identity, address))
    problems = [f"rank {rank}: {member[0]}" for rank, member in enumerate(members) if member[0]]
    if not problems and len({member[1] for member in members}) > 1:
        problems = ["its ranks run on several hosts, in several containers or for several users"]
    if problems:
        problem = problems[0]
    else:
        problem = torch.ops.megatron_samoe.shm_connect(handle, [member[2] for member in members])
    # A barrier as well: nobody closes before all have opened.
    if agreed(group, problem, ShmCommunicator.transport):
        return ShmCommunicator(group, handle, timeout_s)
    if handle >= 0:
        torch.ops.megatron_samoe.shm_close(handle)
    return None


def with_exchange(group: Group, device: torch.device, timeout_s: float = 600.0) -> Group:
    """Returns the group with the fastest exchange of rows its ranks can have on a device. Collective.

    On the CPU: shared memory where all ranks share a host, else torch's process group. On CUDA: the process group; the
    NCCL exchange of ops/nccl_communicator.py is there for those who make it themselves.
    """
    if device.type != "cpu":
        return group
    return replace(group, exchange=create_shm_communicator(group, timeout_s))
