"""The store at which ranks find each other, on the fewest of a host's networks that torch allows."""

from __future__ import annotations

import ipaddress
import os
import socket
from datetime import timedelta

import torch.distributed as dist

from megatron_samoe.parallel_state import launcher

_BACKLOG = 2048


def serve_store(host: str, port: int, **options: object) -> dist.TCPStore:
    """Returns a new store that listens at one address; torch's own listens at all of the machine, whatever it is given.

    Args:
        host: 0.0.0.0 for all, of both kinds.

    Raises:
        OSError: the host has no such address, or its port is taken.
    """
    if host == "0.0.0.0":
        return dist.TCPStore(host, port, is_master=True, **options)  # type: ignore[arg-type]
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        handle = os.dup(listener.fileno())  # which the store closes
    return dist.TCPStore(host, port, is_master=True, master_listen_fd=handle, **options)  # type: ignore[arg-type]


def join_store(timeout: timedelta) -> tuple[dist.Store, int]:
    """Returns the store of torchrun's variables and this rank's number, as torch's "env://" does.

    Where rank 0 serves it, it listens at MASTER_ADDR only, if all hosts mean the same by that.
    """
    if os.environ.get("RANK") == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and _is_own_address():
        host, port, size = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), launcher.world_size()
        return serve_store(host, port, world_size=size, timeout=timeout, multi_tenant=True), 0
    store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
    return store, rank


def _is_own_address() -> bool:
    """Returns whether MASTER_ADDR is an address of this host, for all ranks: a name may mean another one elsewhere."""
    address = os.environ.get("MASTER_ADDR", "")
    try:
        if launcher.local_world_size() < launcher.world_size():
            ipaddress.ip_address(address)
        family, kind, _, _, socket_address = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(socket_address)
    except (ValueError, OSError):  # what is wrong with it torch reports
        return False
    return True
