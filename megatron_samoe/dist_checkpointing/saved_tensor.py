"""Checked reading of one tensor from a file of many: torch.save writes a checksum of each record, which torch.load
ignores.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_samoe.errors import readable

#: Of a file's table of contents: that of 100,000 tensors has some 20 MB.
MAX_PICKLE_BYTES = 64 << 20
#: First byte of a pickle.
_PICKLE = b"\x80"
#: The fields before a record's name in a zip file; the last two are the lengths of its name and of a further field.
LOCAL_HEADER = struct.Struct("<4s5H3I2H")


class Window(io.RawIOBase):
    """A part of a file that reads as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a position in the part, in bytes, and returns it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("a position before the start")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer as far as the part goes, and returns the number of bytes."""
        wanted = memoryview(buffer)[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(wanted)  # type: ignore[attr-defined]
        self._at += count
        return count


def read_saved_tensor(path: Path, start: int, length: int) -> Tensor:
    """Returns the tensor that torch.save wrote to a part of a file, on the CPU, whose bytes have their checksum.

    Raises:
        Exception: of several kinds: the file cannot be read, or the part is not what was written.
    """
    with open(path, "rb") as file:
        window = Window(file, start, length)
        tensor = saved_tensor_in(window)  # type: ignore[arg-type]
        window.seek(0)
        with zipfile.ZipFile(window) as archive:  # type: ignore[arg-type]
            for record in archive.infolist():
                if record.filename.endswith("/data.pkl"):
                    archive.read(record)  # raises an error if its sum is another
                elif record.filename.endswith("/data/0") and zlib.crc32(_storage(tensor)) != record.CRC:
                    raise zipfile.BadZipFile("its bytes are not those that were written")
    return tensor


def saved_tensor_in(file: BinaryIO) -> Tensor:
    """Returns the tensor of a file that torch.save wrote, on the CPU.

    Raises:
        Exception: of several kinds: the file is not what was written.
    """
    refuse_packed(file)
    file.seek(0)
    tensor = torch.load(file, map_location="cpu", weights_only=True)
    if not is_plain(tensor):
        raise ValueError("it is not a plain tensor")
    return tensor


@dataclass(frozen=True)
class SavedBytes:
    """The elements of a tensor in a file, in order, as this machine has them in memory.

    Attributes:
        offset: of the first element in the file.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def find_saved_bytes(file: BinaryIO, start: int, length: int) -> SavedBytes | None:
    """Returns where the elements are of a tensor that torch.save wrote to a part of a file; None where they are in another
    order or of another machine.

    Raises:
        Exception: of several kinds: the file cannot be read, or the part is not what was written.
    """
    window = Window(file, start, length)
    refuse_packed(window)  # type: ignore[arg-type]
    window.seek(0)
    saved = torch.load(window, map_location="meta", weights_only=True)  # type: ignore[arg-type]
    window.seek(0)
    with zipfile.ZipFile(window) as archive:  # type: ignore[arg-type]
        records = {r.filename.partition("/")[2]: r for r in archive.infolist()}
        record, order = records["data/0"], records.get("byteorder")
        foreign = order is not None and archive.read(order) != sys.byteorder.encode()
    if foreign or not saved.is_contiguous() or record.file_size != saved.nbytes:
        return None
    window.seek(record.header_offset)
    header = bytearray(LOCAL_HEADER.size)
    window.readinto(header)
    *_, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header)
    offset = record.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
    if offset + saved.nbytes > length:
        raise EOFError("the file ends within a tensor")
    return SavedBytes(start + offset, tuple(saved.shape), saved.dtype)


def is_plain(value: object) -> bool:
    """Returns whether a loaded value is a dense CPU tensor with all of its elements in memory."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
        and not value.is_quantized
        and value.numel() <= value.untyped_storage().nbytes() // max(value.element_size(), 1)
    )


def refuse_packed(file: Path | BinaryIO) -> None:
    """Raises ValueError where a torch.save file is not as torch writes it, before anything of it is read: an entry that is
    compressed, or that claims more bytes than it has, can fill the memory. Files that are not zip files are left to torch."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            name = record.filename.rpartition("/")[2]
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise ValueError(f"its entry {readable(record.filename)} is compressed, which torch.save never does")
            if name == "data.pkl" and record.file_size > MAX_PICKLE_BYTES:
                raise ValueError(
                    f"its table of contents has {record.file_size:,} bytes; {MAX_PICKLE_BYTES:,} is the most"
                )


def refuse_repacked(path: Path, tensors: Iterable[Tensor]) -> None:
    """Raises ValueError where mapped tensors of a torch.save file have other bytes than those that were saved.

    torch maps a storage from where its entry begins, whatever the entry's size. So a file that has a truncated entry
    would be read as garbage.
    """
    with zipfile.ZipFile(path) as archive:
        sizes: Counter[int] = Counter()
        for record in archive.infolist():
            folder, _, name = record.filename.rpartition("/")
            if folder.rpartition("/")[2] == "data":
                sizes[record.file_size] += 1
            if name == "byteorder" and archive.read(record) != sys.byteorder.encode():
                raise ValueError("it was saved on a machine of the other byte order")
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    if Counter(size for size in storages.values() if size) - sizes:
        raise ValueError("its entries have other sizes than its tensors")


def why_not_loaded(error: Exception, path: Path) -> str:
    """Returns in a few words why torch could not load a file. torch's own message advises to load the file with any
    code in it.
    """
    text = " ".join(str(error).split())
    if named := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it names {named[1]}, which could run any code and which reading weights does not need"
    with contextlib.suppress(OSError), open(path, "rb") as file:
        start = file.read(2)
        if start[:1] == _PICKLE:
            return "it was saved in torch's format of before version 1.6; load and save it with a newer torch"
        if start != b"PK":
            return "it is not a file of torch.save"
    if "weights_only" in text or "upgrade" in text or not text:
        return "it is damaged, or holds more than tensors"
    return readable(text[:200].rstrip("."))


def _storage(tensor: Tensor) -> Any:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()  # type: ignore[call-overload]
