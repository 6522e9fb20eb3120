"""All-to-all over an NCCL communicator of our own, for groups of CUDA ranks.

NCCL is found at run time (torch's own copy as a rule); the extension is built without it. A group's communicator is
made from a unique id that its first rank draws and the process group carries to the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_samoe.ops import extension
from megatron_samoe.ops.communicator import Communicator, agreed
from megatron_samoe.parallel_state.state import Group


class NcclCommunicator(Communicator):
    """All-to-all of device tensors, enqueued on the device's current stream.

    An exchange that a peer never joins, or that the device does not finish within timeout_s, is aborted on this rank;
    the other members learn of it from NCCL's own error or from their time-out.
    """

    transport = "NCCL"
    #: The binding refuses tensors of the CPU, unless the library is the stand-in that tests use.
    device_types = ("cuda", "cpu")

    def _exchange_bytes(
        self, handle: int, x: Tensor, received: Tensor, send_bytes: list[int], recv_bytes: list[int]
    ) -> str:
        problem: str = torch.ops.megatron_samoe.nccl_all_to_all(
            handle, x, received, send_bytes, recv_bytes, self.timeout_s
        )
        return problem

    def _abort(self, handle: int, reason: str) -> None:
        torch.ops.megatron_samoe.nccl_abort(handle, reason)

    def _close(self, handle: int) -> None:
        torch.ops.megatron_samoe.nccl_close(handle)


def nccl_problem() -> str:
    """Returns why NCCL cannot be used here, or an empty string."""
    if not extension.load():
        return "the compiled extension is not in use"
    problem: str = torch.ops.megatron_samoe.nccl_problem()
    return problem


def create_nccl_communicator(group: Group, timeout_s: float = 600.0) -> NcclCommunicator | None:
    """Returns the group's NCCL communicator on the current device, or None on every rank where one rank cannot have it.

    Collective: every member of the group calls it, on the device that it will exchange from.

    Args:
        timeout_s: longest time to connect, and longest time of an exchange.
    """
    if group.size == 1 or not agreed(group, nccl_problem(), NcclCommunicator.transport):
        return None
    ops = torch.ops.megatron_samoe
    handle = ops.nccl_create(group.rank, group.size)
    unique_id = group.all_gather_object(ops.nccl_unique_id() if group.rank == 0 else None)[0]
    problem = ops.nccl_connect(handle, unique_id, timeout_s)
    if agreed(group, problem, NcclCommunicator.transport):
        return NcclCommunicator(group, handle, timeout_s)
    ops.nccl_close(handle)
    return None
