"""An NCCL all-to-all in two hops for groups of several nodes: within a node, then between nodes.

In each node, the rank with local index j collects the node's rows for ranks of index j in other nodes. It sends them to
each node in one message, in the order of their first senders, which is that of the result. So a rank sends one message
to every other node instead of one to every rank there. The other order (between nodes first) sends the same number of messages,
but its rows would arrive in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megatron_samoe.errors import CommunicationError
from megatron_samoe.log import say_once
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange.communicator import Communicator
from megatron_samoe.row_exchange.nccl_communicator import NcclCommunicator, OpenedNccl, open_nccl
from megatron_samoe.row_exchange.shm_communicator import create_host_communicator


@dataclass(frozen=True)
class TwoHops:
    """Messages of one exchange, each four numbers: peer, whether in the staging memory, first byte, number of bytes."""

    first_sends: list[int]
    first_receives: list[int]
    second_sends: list[int]
    second_receives: list[int]
    staging_bytes: int


def plan_two_hops(
    rank: int, send: Sequence[int], receive: Sequence[int], staged_LN: Sequence[Sequence[int]]
) -> TwoHops:
    """Returns the messages of a rank whose group has N nodes of L ranks, one node after the other.

    Args:
        send: bytes for each of the N * L ranks; receive: bytes from each.
        staged_LN: bytes that each rank of this node sends to this rank's local index in each node.
    """
    num_local, num_nodes = len(staged_LN), len(staged_LN[0])
    node, index = divmod(rank, num_local)
    others = [other for other in range(num_nodes) if other != node]
    send_at, receive_at = [0, *accumulate(send)], [0, *accumulate(receive)]
    # In the staging memory: for one node after the other, what each rank of this one has for it.
    staged_at, staging_bytes = {}, 0
    for other in others:
        for local in range(num_local):
            staged_at[local, other] = staging_bytes
            staging_bytes += staged_LN[local][other]
    hops = TwoHops([], [], [], [], staging_bytes)
    for local in range(num_local):
        peer = node * num_local + local
        for other in others:  # two ranks' messages are matched by their order: other nodes', then the own
            to = other * num_local + local
            hops.first_sends.extend((peer, 0, send_at[to], send[to]))
            hops.first_receives.extend((peer, 1, staged_at[local, other], staged_LN[local][other]))
        hops.first_sends.extend((peer, 0, send_at[peer], send[peer]))
        hops.first_receives.extend((peer, 0, receive_at[peer], receive[peer]))
    for other in others:
        peer, ranks = other * num_local + index, slice(other * num_local, (other + 1) * num_local)
        block = sum(staged_LN[local][other] for local in range(num_local))
        hops.second_sends.extend((peer, 1, staged_at[0, other], block))
        hops.second_receives.extend((peer, 0, receive_at[ranks.start], sum(receive[ranks])))
    return hops


class HierarchicalCommunicator(NcclCommunicator):
    """An NcclCommunicator between nodes with equally many ranks, one node after the other in the group.

    Args:
        local: communicator of this node's ranks, for sizes: these travel through the host's memory, so no exchange
            waits for a device.
    """

    transport = "NCCL by nodes"

    def __init__(self, group: Group, opened: OpenedNccl, local: Communicator, timeout_s: float):
        super().__init__(group, opened, timeout_s)
        self._local = local
        self._staging: Tensor | None = None

    def _start(self, x: Tensor, received: Tensor, send_bytes: list[int], recv_bytes: list[int]) -> tuple[int, str]:
        num_local = self._local.group.size
        sizes_LN = torch.tensor(send_bytes).view(-1, num_local).t().contiguous()
        try:
            staged_LN = self._local.exchange_evenly(sizes_LN).tolist()
        except CommunicationError as error:  # which the other nodes' ranks do not hear of by themselves
            self.abort(str(error))
            raise
        hops = plan_two_hops(self.group.rank, send_bytes, recv_bytes, staged_LN)
        staging, problem = self._staging_of(hops.staging_bytes, x.device)
        if problem:
            return 0, problem
        started: tuple[int, str] = torch.ops.megatron_samoe.nccl_start_hops(
            self._handle,
            x,
            received,
            staging,
            hops.first_sends,
            hops.first_receives,
            hops.second_sends,
            hops.second_receives,
        )
        self._keep_until_done(x, received, staging)
        return started

    def _staging_of(self, num_bytes: int, device: torch.device) -> tuple[Tensor, str]:
        """Returns the memory between two hops. Exchanges follow each other in one stream, so all use the same memory."""
        problem = ""
        if self._staging is None or self._staging.numel() < num_bytes:
            staging = torch.empty(max(2 * num_bytes, 1 << 20), dtype=torch.uint8, device=device)
            problem = self._in_slices("pending", torch.ops.megatron_samoe.nccl_use_staging, staging)
            self._staging = staging
        return self._staging, problem

    def abort(self, reason: str) -> None:
        """Makes the exchange that this rank is in, and all later ones, fail with the reason."""
        super().abort(reason)
        self._local.abort(reason)

    def close(self) -> None:
        """Frees what the communicator holds. A peer that still needs this rank gets a CommunicationError."""
        super().close()
        self._local.close()


def create_hierarchical_communicator(
    group: Group, timeout_s: float = 600.0, device: torch.device | str = "cuda"
) -> NcclCommunicator | None:
    """Returns the group's communicator in two hops, in one hop where the nodes do not allow two, or None as
    create_nccl_communicator does (both logged once). Collective.
    """
    found = create_host_communicator(group, timeout_s) if group.size > 1 else None
    problem = "" if found is not None else "it needs several ranks on one node"
    if found is not None:
        problem = nodes_problem(found[1])
    opened = open_nccl(group, timeout_s, torch.device(device))
    if opened is not None and found is not None and not problem:
        return HierarchicalCommunicator(group, opened, found[0], timeout_s)
    if found is not None:
        found[0].close()
    if opened is None:
        return None
    say_once(f"Group {group.name!r} exchanges rows in one hop, not by nodes: {problem}.")
    return NcclCommunicator(group, opened, timeout_s)


def nodes_problem(hosts: Sequence[int]) -> str:
    """Returns why a group with ranks on these hosts cannot exchange by nodes, or an empty string."""
    num_local = hosts.count(hosts[0])
    if len(set(hosts)) == 1:
        return "all its ranks are on one node"
    if len(hosts) != num_local * len(set(hosts)) or any(
        hosts[first : first + num_local] != [hosts[first]] * num_local for first in range(0, len(hosts), num_local)
    ):
        return "its nodes do not have equally many ranks, or not one node's after the other's"
    return ""
