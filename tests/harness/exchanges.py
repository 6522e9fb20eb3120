"""Communicators of every transport, for tests of what each of them must do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_samoe.errors import CommunicationError
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange import shm_communicator
from megatron_samoe.row_exchange.communicator import Communicator
from megatron_samoe.row_exchange.hierarchical_communicator import create_hierarchical_communicator
from megatron_samoe.row_exchange.nccl_communicator import create_nccl_communicator
from megatron_samoe.row_exchange.shm_communicator import create_shm_communicator
from tests.harness import nccl_library


@dataclass(frozen=True)
class Transport:
    """What carries rows between ranks.

    Attributes:
        kind: "shm", "nccl" (the stand-in for it), or "nodes" (the same in two hops).
        hosts: the host on which each rank claims to be.
        library: the stand-in for NCCL.
    """

    kind: str
    hosts: tuple[int, ...]
    library: str

    @property
    def world_size(self) -> int:
        return len(self.hosts)

    def open(self, timeout_s: float = 30.0, fault: str = "") -> Communicator:
        """Returns a communicator of all ranks, which call it together; a fault is of fake_nccl.cpp."""
        claim_host(self.hosts)
        if self.kind == "shm":
            found = create_shm_communicator(world_group(), timeout_s)
        else:
            nccl_library.use(self.library, fault)
            create = create_nccl_communicator if self.kind == "nccl" else create_hierarchical_communicator
            found = create(world_group(), timeout_s, "cpu")
        assert found is not None
        return found


def world_group() -> Group:
    """Returns the group of all ranks."""
    return Group("ep", tuple(range(dist.get_world_size())), dist.get_rank(), dist.group.WORLD)


def claim_host(hosts: Sequence[int]) -> None:
    """Makes this rank claim that it runs on its one of these hosts."""
    identity = (f"boot {hosts[dist.get_rank()]}", "pid:[1]", 0)
    shm_communicator._host_identity = lambda: identity


def through_torch(x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """Returns the rows that torch's all-to-all brings; as bytes, since not every release of gloo knows bf16."""
    received = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(received.view(torch.uint8), x.contiguous().view(torch.uint8), list(receive), list(send))
    return received


def error_of(function: Callable[[], object]) -> str:
    """Returns the message with which communication fails."""
    with pytest.raises(CommunicationError) as caught:
        function()
    return str(caught.value)
