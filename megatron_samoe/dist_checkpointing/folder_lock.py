"""A lock, so that one run at a time writes to a folder of checkpoints.

The lock is the kernel's (flock), so it ends with its process however that ends. It holds between hosts where the file
system carries locks (NFS, Lustre with -o flock, and most others). The file says who holds it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_samoe.errors import CheckpointError
from megatron_samoe.log import logger

NAME = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class FolderInUseError(CheckpointError):
    """Another process holds the lock of a folder."""


@contextlib.contextmanager
def folder_lock(root: str | Path, patience_s: float = 0.0) -> Iterator[None]:
    """Holds the lock of an existing, writable folder.

    Args:
        patience_s: longest wait, in seconds, for a holder that may be about to end.

    Raises:
        FolderInUseError: another process holds the lock; the message says which, where and since when.
    """
    until = time.monotonic() + patience_s
    while True:
        try:
            handle = _acquire(Path(root) / NAME)
            break
        except CheckpointError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                os.unlink(Path(root) / NAME)  # while it is held: whoever waits on this file finds that it is gone
            os.close(handle)


def _acquire(path: Path) -> int | None:
    """Returns the open and locked file descriptor; None where the file system has no locks."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}.", collective=True) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held_by = _holder(handle)
            os.close(handle)
            if error.errno in _UNSUPPORTED:
                logger.info(f"{path.parent} is on a file system without locks: see that no other run writes there")
                return None
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise FolderInUseError(
                f"{path.parent} is in use by another run ({held_by}). Two runs would replace each other's checkpoints: give "
                "another --save or --run-dir, or end that run.",
                collective=True,
            ) from None
        if _is_still(handle, path):
            holder = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            with contextlib.suppress(OSError):  # a full disk is for the first checkpoint to report
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(holder).encode(), 0)
            return handle
        os.close(handle)


def _is_still(handle: int, path: Path) -> bool:
    """Returns whether an open file is still the one under its name; the previous holder may have removed it."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False


def _holder(handle: int) -> str:
    try:
        holder = json.loads(os.pread(handle, 1000, 0))
        return f"process {holder['process']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError, OSError):
        return "which has not said who it is"
