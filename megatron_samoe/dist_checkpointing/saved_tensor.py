"""One tensor out of a file of many, checked: torch.save leaves a sum over each record, and torch.load does not look."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor


class Window(io.RawIOBase):
    """A part of a file as a file of its own, for reading."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Returns the position in the part."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a position in the part and returns it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("a position before the start")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer as far as the part goes, and returns by how much."""
        wanted = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(wanted)  # type: ignore[attr-defined]
        self._at += count
        return count


def read_saved_tensor(path: Path, start: int, length: int) -> Tensor:
    """Returns the tensor that torch.save wrote to a part of a file, on the CPU.

    Raises:
        Exception: of several kinds: the file cannot be read, or the part is not what was written.
    """
    with open(path, "rb") as file:
        window = Window(file, start, length)
        tensor = torch.load(window, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        window.seek(0)
        with zipfile.ZipFile(window) as archive:  # type: ignore[arg-type]
            for record in archive.infolist():
                if record.filename.endswith("/data.pkl"):
                    archive.read(record)  # raises an error if its sum is another
                elif record.filename.endswith("/data/0") and zlib.crc32(_storage(tensor)) != record.CRC:
                    raise zipfile.BadZipFile("its bytes are not those that were written")
    return tensor


def _storage(tensor: Tensor) -> Any:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()  # type: ignore[call-overload]
