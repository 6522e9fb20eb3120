"""Memory of weights in a file, that Linux may drop and read again; contents and addresses stay.

A model decodes whose weights are larger than the memory that it may use, if slower: what a step reads and does not find in
memory comes from the disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from megatron_samoe.errors import DataError

_MAP_FIXED = 0x10


def keep_in_file(tensors: Iterable[Tensor], folder: Path) -> int:
    """Moves the memory of tensors on the CPU into a file without a name, which ends with the process; returns its bytes.

    Contents and addresses stay. What does not fill a page stays in memory, and so do tensors that share one with others.

    Raises:
        DataError: the file cannot be written, or this is not Linux.
    """
    if sys.platform != "linux":
        raise DataError("Weights in a file need Linux.")
    page = mmap.PAGESIZE
    inner = [(-(-start // page) * page, (start + size) // page * page) for start, size in _places(tensors)]
    inner = [(first, last) for first, last in inner if first < last]
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for first, last in inner:
                file.write((ctypes.c_char * (last - first)).from_address(first))
            file.flush()
            os.fsync(file.fileno())
            offset = 0
            for first, last in inner:
                _map(file.fileno(), offset, first, last - first)
                offset += last - first
            with contextlib.suppress(OSError):  # what was written need not be kept for that
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise DataError(f"Weights cannot be kept in a file in {folder}: {error.strerror or error}.") from None
    return offset


def _map(handle: int, offset: int, address: int, length: int) -> None:
    """Maps a part of a file over memory; later writes stay this process's own."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    found = libc.mmap(address, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED, handle, offset)
    if found != address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _places(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Returns address and bytes of the memory of tensors on the CPU, in order."""
    storages = (t.untyped_storage() for t in tensors if t.device.type == "cpu")
    return sorted({(storage.data_ptr(), storage.nbytes()) for storage in storages})
