"""What somebody without a password tries at the ports of a job: `python -u -m tests.hosts.stranger WHAT ADDRESS:PORT...`."""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
import socket
import time
from collections.abc import Sequence

import torch.distributed as dist


class _Touch:
    """Makes whoever unpickles it run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch $TMPDIR/a-stranger-was-here",)


def main(argv: Sequence[str]) -> int:
    """Tries one thing, and prints what came of it."""
    what, *places = argv
    if what == "noise":
        held = [connection for place in places for connection in _noise(place)]
        time.sleep(5)
        print(f"{len(held)} connections to {len(places)} ports")
        return 0
    address, _, port = places[0].rpartition(":")
    store = dist.TCPStore(address, int(port), is_master=False, wait_for_workers=False)
    keys = store.list_keys()
    if what == "keys":
        print("".join(f"key {key} {store.get(key)!r}\n" for key in keys), flush=True)
    elif what == "code":
        key = min((key for key in keys if "torch.rendezvous" in key), key=len)
        store.set(key, base64.b64encode(pickle.dumps(_Touch())).decode())
    return 0


def _noise(place: str) -> list[socket.socket]:
    """Sends what no peer sends; returns the connections, to be held open."""
    address, _, port = place.rpartition(":")
    held: list[socket.socket] = []
    for sent in (b"", b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 64, bytes(1 << 16), os.urandom(1 << 20)):
        for _ in range(10):
            with contextlib.suppress(OSError):
                held.append(socket.create_connection((address, int(port)), timeout=5))
                held[-1].sendall(sent)
    return held
