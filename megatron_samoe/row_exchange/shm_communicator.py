"""An all-to-all through shared memory, for groups with ranks on one host.

A communicator belongs to one group, and all its ranks make it together. Where they run on several hosts, ranks of one
host use shared memory among themselves and torch's process group to the others. Where a communicator cannot be made (no
compiled extension, no two ranks on a host, system calls that a sandbox forbids), all ranks learn the same reason and
the process group does all the work.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_samoe.ops import extension
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange.communicator import SLICE_S, Communicator, agreed, connect
from megatron_samoe.row_exchange.hostwise_communicator import HostwiseCommunicator

_SPINS_WITH_OWN_CORE, _SPINS_ON_SHARED_CORES = 2000, 50


def _host_identity() -> tuple[str, str, int]:
    """Returns the identity that two processes must share to open each other's memory: kernel boot, pid namespace, user."""
    return (
        Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        os.readlink("/proc/self/ns/pid"),
        os.geteuid(),
    )


def _num_spins(group_size: int) -> int:
    """Returns the number of spins of a wait: few where there are more ranks than cores, since other ranks need the
    core.
    """
    local_ranks = max(group_size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    cores = len(os.sched_getaffinity(0))
    return _SPINS_WITH_OWN_CORE if local_ranks <= cores else _SPINS_ON_SHARED_CORES


class ShmCommunicator(Communicator):
    """An all-to-all of CPU tensors between processes of one host. An abort reaches every member."""

    transport = "shared memory"

    def gathered(self, x: Tensor, index: Tensor, divisor: int) -> Tensor:
        """Returns rows x[index // divisor] in shared memory, from which peers copy them in the exchange.

        The next call overwrites the memory. Without shared memory the rows are in this rank's own.
        """
        if self._handle is None:
            return super().gathered(x, index, divisor)
        state = "pending"
        while state == "pending":
            rows, state = torch.ops.megatron_samoe.shm_stage_rows(self._handle, x, index, divisor, SLICE_S)
        if state.startswith("unavailable"):
            return super().gathered(x, index, divisor)
        self._raise(state)
        return rows


def create_shm_communicator(group: Group, timeout_s: float = 600.0) -> Communicator | None:
    """Returns the group's communicator, or None on every rank if one rank cannot have it (logged once).

    Collective: every member of the group calls it.

    Args:
        timeout_s: longest silence of a peer in an exchange.
    """
    if group.size == 1:
        return None
    found = create_host_communicator(group, timeout_s)
    if found is None:
        return None
    communicator, hosts = found
    here = [rank for rank, host in enumerate(hosts) if host == hosts[group.rank]]
    return communicator if len(here) == group.size else HostwiseCommunicator(group, communicator, here, timeout_s)


def create_host_communicator(group: Group, timeout_s: float) -> tuple[ShmCommunicator, list[int]] | None:
    """Returns a communicator of the members on this host, and the host of each member of the group, as numbers.

    None on every rank if one rank cannot have it, or no two ranks share a host (logged once). Collective.
    """
    handle, problem, identity, address = -1, "", ("", "", 0), ""
    if not extension.load():
        problem = "the compiled extension is not in use"
    else:
        try:
            identity = _host_identity()
        except OSError as error:
            problem = str(error)
    members = group.all_gather_object((problem, identity))
    identities = [member[1] for member in members]
    problems = [f"rank {rank}: {member[0]}" for rank, member in enumerate(members) if member[0]]
    if not problems and max(Counter(identities).values()) == 1:
        problems = ["each of its ranks runs on another host, in another container or for another user"]
    problem = problems[0] if problems else ""
    here = [rank for rank, other in enumerate(identities) if other == identity]
    if not problem:
        try:
            spins = _num_spins(len(here))
            handle = torch.ops.megatron_samoe.shm_create(here.index(group.rank), len(here), spins, timeout_s)
            address = torch.ops.megatron_samoe.all_to_all_address(handle)
        except RuntimeError as error:
            problem = str(error).splitlines()[0]
    addresses = group.all_gather_object(address)
    if not problem and all(addresses):
        problem = connect(handle, [addresses[rank] for rank in here])
    # A barrier as well: nobody closes before all have opened.
    if not agreed(group, problem, ShmCommunicator.transport, {} if problem else extension.build_identity()):
        if handle >= 0:
            torch.ops.megatron_samoe.all_to_all_close(handle)
        return None
    local = replace(group, ranks=tuple(group.ranks[rank] for rank in here), rank=here.index(group.rank))
    hosts = [identities.index(other) for other in identities]
    return ShmCommunicator(local, handle, timeout_s), hosts
