"""The choice of the all-to-all for a group's rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from megatron_samoe.config.rules.layout import ON_CPUS
from megatron_samoe.errors import ConfigError
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange.communicator import Communicator
from megatron_samoe.row_exchange.hierarchical_communicator import create_hierarchical_communicator
from megatron_samoe.row_exchange.nccl_communicator import create_nccl_communicator
from megatron_samoe.row_exchange.shm_communicator import create_shm_communicator


def with_exchange(
    group: Group,
    device: torch.device,
    timeout_s: float = 600.0,
    backend: Literal["auto", "torch", "extension"] = "auto",
    by_nodes: bool = False,
) -> Group:
    """Returns the group with the transport of rows that its ranks use on a device. Collective.

    Args:
        timeout_s: longest wait for another rank.
        backend: torch: the process group. extension: on the CPU shared memory, on CUDA NCCL. auto: the extension on the
            CPU where ranks share a host, else the process group.
        by_nodes: over NCCL, send within a node first and then between nodes.

    Raises:
        ConfigError: the extension is asked for and cannot be had, or exchanges by nodes on the CPU.
    """
    if by_nodes and device.type == "cpu":
        raise ConfigError("--moe-hierarchical-all-to-all", True, f"needs CUDA: {ON_CPUS}")
    if group.size == 1 or backend == "torch" or (backend == "auto" and device.type != "cpu"):
        return group
    exchange: Communicator | None
    if device.type == "cpu":
        exchange = create_shm_communicator(group, timeout_s)
    elif by_nodes:
        exchange = create_hierarchical_communicator(group, timeout_s, device)
    else:
        exchange = create_nccl_communicator(group, timeout_s, device)
    if exchange is None and backend == "extension":
        without = ", without --moe-hierarchical-all-to-all" if by_nodes else ""
        raise ConfigError(
            "--moe-all-to-all-backend", backend, f"cannot be had here (the reason is above); torch can{without}"
        )
    return replace(group, exchange=exchange)
