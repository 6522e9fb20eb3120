"""All-to-all through shared memory, for groups whose ranks run on one host.

A communicator belongs to one group and is made by all its ranks together. Where it cannot be made (no compiled
extension, several hosts or containers, system calls that a sandbox forbids), all ranks learn the same reason and torch's
process group does the work.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_samoe.errors import CommunicationError
from megatron_samoe.log import say_once
from megatron_samoe.ops import extension
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
    """Returns how often a wait may spin: other ranks need the core where there are more threads than cores."""
    local_ranks = max(group_size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    cores = len(os.sched_getaffinity(0))
    return _SPINS_WITH_OWN_CORE if local_ranks <= cores else _SPINS_ON_SHARED_CORES


class ShmCommunicator:
    """A group's all-to-all through shared memory. Exchanges are numbered: all ranks must call them in the same order.

    After an error it stays unusable, and so do its peers; make a new one.
    """

    def __init__(self, group: Group, handle: int, timeout_s: float):
        self.group, self.timeout_s = group, timeout_s
        self._handle: int | None = handle

    def all_to_all_rows(self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Tensor:
        """Returns the rows that all members sent here, in group order; differentiable.

        Args:
            x: [sum(send_rows), ...], rows for member 0 first; any dtype, on the CPU.
            send_rows: rows for each member.
            receive_rows: rows from each member, as the others' send_rows say.

        Errors: CommunicationError where a peer dies, gives up, disagrees about the splits or is silent for timeout_s;
        ValueError where the splits do not fit x.
        """
        received: Tensor = _AllToAllRows.apply(x, list(send_rows), list(receive_rows), self)
        return received

    def exchange(self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Tensor:
        """As all_to_all_rows, not recorded by autograd."""
        if self._handle is None:
            raise CommunicationError(f"The shared-memory communicator of group {self.group.name!r} is closed.")
        if len(send_rows) != self.group.size or len(receive_rows) != self.group.size or sum(send_rows) != x.shape[0]:
            raise ValueError(
                f"{x.shape[0]} rows in {self.group.size} ranks: send_rows = {list(send_rows)}, "
                f"receive_rows = {list(receive_rows)}"
            )
        row_bytes = x.element_size()
        for size in x.shape[1:]:
            row_bytes *= size
        received = x.new_empty((sum(receive_rows), *x.shape[1:]))
        ops = torch.ops.megatron_samoe
        x = x.detach().contiguous()
        send_bytes = [rows * row_bytes for rows in send_rows]
        recv_bytes = [rows * row_bytes for rows in receive_rows]
        state = ops.shm_all_to_all(self._handle, x, received, send_bytes, recv_bytes, _SLICE_S, self.timeout_s)
        while state == "pending":
            try:
                state = ops.shm_run(self._handle, _SLICE_S, self.timeout_s)
            except BaseException:  # an interrupt between two slices leaves the exchange half done on all ranks
                self.abort("interrupted")
                raise
        if state:
            raise CommunicationError(f"All-to-all over group {self.group.name!r} through shared memory, {state}")
        return received

    def abort(self, reason: str) -> None:
        """Makes the exchange that any member is in, and all later ones, fail with the reason."""
        if self._handle is not None:
            torch.ops.megatron_samoe.shm_abort(self._handle, reason)

    def close(self) -> None:
        """Frees the shared memory. A peer that still needs this rank gets a CommunicationError."""
        handle, self._handle = self._handle, None
        if handle is not None:
            torch.ops.megatron_samoe.shm_close(handle)

    def __enter__(self) -> ShmCommunicator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at interpreter exit torch's ops may be gone
            self.close()


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send_rows: list[int], receive_rows: list[int], communicator: ShmCommunicator
    ) -> Tensor:
        ctx.splits, ctx.communicator = (send_rows, receive_rows), communicator
        return communicator.exchange(x, send_rows, receive_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        send_rows, receive_rows = ctx.splits
        return ctx.communicator.exchange(grad, receive_rows, send_rows), None, None, None


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
    if not problems:
        problem = torch.ops.megatron_samoe.shm_connect(handle, [member[2] for member in members])
        # This gather is also a barrier: nobody closes before all have opened.
        problems = [text for text in group.all_gather_object(problem) if text]
    if not problems:
        return ShmCommunicator(group, handle, timeout_s)
    if handle >= 0:
        torch.ops.megatron_samoe.shm_close(handle)
    say_once(f"Group {group.name!r} exchanges rows through torch, not through shared memory: {problems[0]}.")
    return None
