"""All-to-all through shared memory, for groups with ranks on one host.

A communicator belongs to one group and is made by all its ranks together. Where its ranks run on several hosts, ranks of
one host use shared memory among themselves and torch's process group to the others. Where it cannot be made (no
compiled extension, no two ranks on a host, system calls that a sandbox forbids), all ranks learn the same reason and the
process group does all the work.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_samoe.ops import extension
from megatron_samoe.ops.communicator import Communicator, agreed
from megatron_samoe.ops.hostwise_communicator import HostwiseCommunicator
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
        return self.exchange_parts(x, received, [], send_bytes, [], recv_bytes)

    def exchange_parts(
        self, x: Tensor, received: Tensor, send_offsets: list[int], send_bytes: list[int], recv_offsets: list[int],
        recv_bytes: list[int],
    ) -> str:  # fmt: skip
        """As _exchange_bytes, between parts of the tensors that begin at the given bytes."""
        ops = torch.ops.megatron_samoe
        state: str = ops.shm_all_to_all(
            self._handle, x, received, send_offsets, send_bytes, recv_offsets, recv_bytes, _SLICE_S, self.timeout_s
        )
        while state == "pending":
            try:
                state = ops.shm_run(self._handle, _SLICE_S, self.timeout_s)
            except BaseException:  # an interrupt between two slices leaves the exchange half done on all ranks
                self.abort("interrupted")
                raise
        return state

    def gathered(self, x: Tensor, index: Tensor, divisor: int) -> Tensor:
        """Returns rows x[index // divisor] in shared memory, from where peers copy them when they are exchanged.

        The memory is written again by the next call; where there is none, the rows lie in this rank's own.
        """
        if self._handle is None:
            return super().gathered(x, index, divisor)
        state = "pending"
        while state == "pending":
            rows, state = torch.ops.megatron_samoe.shm_stage_rows(
                self._handle, x, index, divisor, _SLICE_S, self.timeout_s
            )
        if state.startswith("unavailable"):
            return super().gathered(x, index, divisor)
        self._raise(state)
        return rows

    def _abort(self, handle: int, reason: str) -> None:
        torch.ops.megatron_samoe.shm_abort(handle, reason)

    def _close(self, handle: int) -> None:
        torch.ops.megatron_samoe.shm_close(handle)


def create_shm_communicator(group: Group, timeout_s: float = 600.0) -> Communicator | None:
    """Returns the group's communicator, or None on every rank where one rank cannot have it (said once).

    Collective: every member of the group calls it.

    Args:
        timeout_s: longest silence of a peer in an exchange.
    """
    if group.size == 1:
        return None
    handle, problem, identity, address = -1, "", ("", "", 0), ""
    hosts: list[tuple[str, str, int]] = []
    if not extension.load():
        problem = "the compiled extension is not in use"
    else:
        try:
            identity = _host_identity()
        except OSError as error:
            problem = str(error)
    members = group.all_gather_object((problem, identity))
    hosts = [member[1] for member in members]
    problems = [f"rank {rank}: {member[0]}" for rank, member in enumerate(members) if member[0]]
    if not problems and max(Counter(hosts).values()) == 1:
        problems = ["each of its ranks runs on another host, in another container or for another user"]
    problem = problems[0] if problems else ""
    here = [rank for rank, host in enumerate(hosts) if host == identity]
    if not problem:
        try:
            handle = torch.ops.megatron_samoe.shm_create(here.index(group.rank), len(here), _num_spins(len(here)))
            address = torch.ops.megatron_samoe.shm_address(handle)
        except RuntimeError as error:
            problem = str(error).splitlines()[0]
    addresses = group.all_gather_object(address)
    if not problem and all(addresses):
        problem = torch.ops.megatron_samoe.shm_connect(handle, [addresses[rank] for rank in here])
    # A barrier as well: nobody closes before all have opened.
    if not agreed(group, problem, ShmCommunicator.transport):
        if handle >= 0:
            torch.ops.megatron_samoe.shm_close(handle)
        return None
    local = replace(group, ranks=tuple(group.ranks[rank] for rank in here), rank=here.index(group.rank))
    communicator = ShmCommunicator(local, handle, timeout_s)
    return communicator if len(here) == group.size else HostwiseCommunicator(group, communicator, here, timeout_s)


def with_exchange(group: Group, device: torch.device, timeout_s: float = 600.0) -> Group:
    """Returns the group with the fastest exchange of rows its ranks can have on a device. Collective.

    On the CPU: shared memory where ranks share a host, else torch's process group. On CUDA: the process group; the
    NCCL exchange of ops/nccl_communicator.py is there for those who make it themselves.
    """
    if device.type != "cpu":
        return group
    return replace(group, exchange=create_shm_communicator(group, timeout_s))
