"""Which hosts have stopped to answer, as this host's kernel knows it: where a link is down, communication itself only times out."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Mapping
from pathlib import Path

#: A packet was sent again as often as this, over about a second, and not acknowledged.
_TRIES = 3


def own_address() -> str:
    """Returns the address under which this host reaches the store of its job; empty without a job."""
    with contextlib.suppress(OSError, KeyError):
        family, _, _, _, address = socket.getaddrinfo(os.environ["MASTER_ADDR"], 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # which sends nothing
            return str(probe.getsockname()[0])
    return ""


def silent_hosts(hosts: Mapping[str, str]) -> str:
    """Returns a sentence that names hosts which do not answer, or an empty string.

    Args:
        hosts: names by address.
    """
    silent: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            silent |= unanswered(Path(table).read_text())
    named = sorted({hosts[address] for address in silent if address in hosts})
    return f"No answer comes from {', '.join(named)}, which may have lost its power or its link." if named else ""


def unanswered(table: str) -> set[str]:
    """Returns the remote addresses in the text of /proc/net/tcp or tcp6 that do not acknowledge what they were sent, though it
    was sent again at least _TRIES times."""
    found = set()
    for line in table.splitlines()[1:]:
        _, _, remote, _, queues, _, retransmits, *_ = line.split()
        if int(retransmits, 16) >= _TRIES and int(queues.partition(":")[0], 16) > 0:
            words = bytes.fromhex(remote.partition(":")[0])
            # Each word of four bytes is a number in the host's byte order, little-endian.
            address = ipaddress.ip_address(b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4)))
            found.add(str(getattr(address, "ipv4_mapped", None) or address))
    return found
