"""Memory of weights, whose contents and addresses stay: on huge pages, or in a file that Linux may read again.

In a file, a model decodes whose weights are larger than the memory that it may use, if slower: what a step reads and does not
find in memory comes from the disk. On huge pages, reading weights in order costs no look-ups of addresses on the way.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import mmap
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from megatron_samoe.errors import DataError

_MAP_FIXED = 0x10
_HUGE_PAGE_BYTES = 2 << 20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # the second since Linux 6.1
#: Pages in a row that may fail before no more is asked for: each failure costs a search for free memory.
_MOST_FAILURES = 64


def ask_for_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Asks Linux to put tensors' memory on huge pages now; returns the bytes for which it did.

    Contents and addresses stay. Without such a kernel, or without free huge pages, nothing changes.
    """
    madvise = _madvise()
    if madvise is None:
        return 0
    pages: list[range] = []
    for start, size in _places(tensors):
        first = -(-start // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        length = (start + size - first) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
        if length > 0:
            pages.append(range(first, first + length, _HUGE_PAGE_BYTES))
            # What cannot be collapsed now, Linux may merge later.
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    done = failures = 0
    # Page by page: the first that fails ends a call, and the next one may find memory that was freed meanwhile.
    for page in itertools.chain.from_iterable(pages):
        if madvise(ctypes.c_void_p(page), ctypes.c_size_t(_HUGE_PAGE_BYTES), _MADV_COLLAPSE) == 0:
            done, failures = done + _HUGE_PAGE_BYTES, 0
        else:
            failures += 1
            if failures == _MOST_FAILURES:
                break
    return done


@functools.cache
def _madvise() -> ctypes._CFuncPtr | None:  # type: ignore[name-defined]
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "madvise", None)


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
