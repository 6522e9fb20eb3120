"""Huge pages for weights: reading them in order then costs no look-ups of addresses on the way."""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
from collections.abc import Iterable

from torch import Tensor

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
    places = {(s.data_ptr(), s.nbytes()) for t in tensors if t.device.type == "cpu" for s in [t.untyped_storage()]}
    pages: list[range] = []
    for start, size in sorted(places):
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
