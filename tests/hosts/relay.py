"""A cable with delay and loss: two network devices, and a process that carries packets from one to the other."""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import time
from multiprocessing.connection import Connection

_SET_INTERFACE, _TAP, _NO_HEADER, _WITH_HEADER = 0x400454CA, 0x0002, 0x1000, 0x4000
#: Packets come as the sender's TCP made them, up to 64 KB, and their checksums are not computed: fewer turns of the relay.
_SET_OFFLOAD, _LARGE = 0x400454D0, 0b11
_MTU, _LARGEST = 9000, 1 << 16


def relay(ready: Connection, host: int, switch: int, port: str, delay_s: float, loss: float) -> None:
    """Carries packets between eth0 of a host and a port of the switch until it is killed.

    Args:
        host, switch: processes in whose networks the ends are made.
        delay_s: of each packet; loss: the share of packets that do not arrive, the same ones in every run.
    """
    ends = [_device(host, "eth0", loss == 0), _device(switch, port, loss == 0)]
    ready.send("")
    dice = random.Random(1)
    under_way: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        wait = None if not under_way else max(0.0, under_way[0][0] - time.monotonic())
        for end in select.select(ends, [], [], wait)[0]:
            try:
                packet = os.read(end, _LARGEST + 100)
            except OSError:  # the host is gone
                return
            if dice.random() >= loss:
                number += 1
                heapq.heappush(under_way, (time.monotonic() + delay_s, number, ends[end == ends[0]], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, to, packet = heapq.heappop(under_way)
            try:
                os.write(to, packet)
            except OSError:  # an interface that is down
                continue


def _device(pid: int, name: str, large: bool) -> int:
    """Returns a network device that a process's network is given.

    Args:
        large: carry packets larger than the network's.
    """
    from tests.hosts.cluster import _NET, _run, enter

    enter(pid, _NET)
    device = os.open("/dev/net/tun", os.O_RDWR)
    kind = _TAP | _NO_HEADER | (_WITH_HEADER if large else 0)
    fcntl.ioctl(device, _SET_INTERFACE, struct.pack("16sH22x", name.encode(), kind))
    if large:
        fcntl.ioctl(device, _SET_OFFLOAD, _LARGE)
    _run("ip", "link", "set", name, "mtu", _MTU)
    return device
