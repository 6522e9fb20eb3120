"""The store at which ranks meet, on as few of a host's networks as torch allows."""

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

    Raises:
        OSError: the host has no such address, or its port is taken.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        handle = os.dup(listener.fileno())  # which the store closes
    return dist.TCPStore(host, port, is_master=True, master_listen_fd=handle, **options)  # type: ignore[arg-type]


def join_store(timeout: timedelta) -> tuple[dist.Store, int]:
    """Returns the store of torchrun's variables and this rank's number, as torch's "env://" does.

    Where rank 0 serves it, it listens at MASTER_ADDR alone.
    """
    if os.environ.get("RANK") == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and _is_own_address():
        host, port, size = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), launcher.world_size()
        return serve_store(host, port, world_size=size, timeout=timeout, multi_tenant=True), 0
    store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
    return store, rank


def _is_own_address() -> bool:
    """Returns whether MASTER_ADDR is an address of this host that all ranks reach; a forwarded one is not."""
    try:
        address = socket.getaddrinfo(os.environ["MASTER_ADDR"], None, type=socket.SOCK_STREAM)[0]
        with socket.socket(address[0], socket.SOCK_STREAM) as probe:
            probe.bind(address[4])
    except (KeyError, OSError):  # which torch reports
        return False
    alone = launcher.local_world_size() == launcher.world_size()
    return alone or not ipaddress.ip_address(address[4][0].partition("%")[0]).is_loopback
