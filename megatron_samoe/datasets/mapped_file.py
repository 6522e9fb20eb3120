"""Files that are read as memory, which become a bus error where another program cuts them short."""

from __future__ import annotations

import mmap
from typing import BinaryIO

import numpy as np

from megatron_samoe.errors import DataError


class MappedFile(mmap.mmap):
    """The bytes of a file as memory, read-only; it knows what it maps. An empty file cannot be mapped.

    Attributes:
        path: as messages name the file.
    """

    path: str

    @classmethod
    def of(cls, file: BinaryIO, path: str) -> MappedFile:
        """Returns the bytes of an open file, all of them."""
        mapped = cls(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.path = path
        return mapped


def require_whole(*arrays: np.ndarray) -> None:
    """Raises DataError, by the file's name, where a file that arrays lie in is shorter than when it was mapped.

    The kernel ends a process that touches what a file has lost, and names nothing. So this is called before reads; it asks
    for the size only, which takes a microsecond.
    """
    for array in arrays:
        base: object = array
        while isinstance(base, (np.ndarray, memoryview)):
            base = base.base if isinstance(base, np.ndarray) else base.obj
        if isinstance(base, MappedFile) and (size := base.size()) < len(base):
            raise DataError(
                f"{base.path} was cut short while it was in use: it had {len(base)} bytes when it was opened, and has "
                f"{size}. Restore it, and start again."
            )
