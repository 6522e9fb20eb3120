"""torch.save tensor by tensor: the table of contents first, then each tensor's bytes as it is made.

torch.save wants everything in memory. Its format is a zip archive: `data.pkl`, a pickle in which each tensor names its
storage, and one uncompressed entry `data/KEY` per storage, whose bytes begin at a multiple of 64 in the file.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

ALIGNMENT = 64
_LOCAL_HEADER_BYTES = 30
#: What zipfile adds to a local header for entries of any size.
_ZIP64_BYTES = 20
#: Marks the filling bytes in a header, as torch marks its own.
_FILLING = 0x4246
_ARCHIVE = "archive"


@dataclass(frozen=True)
class _Storage:
    """Stands in the pickle for the bytes of one tensor."""

    key: str
    dtype: torch.dtype
    count: int


class PromisedTensor:
    """Stands in a file's content for a contiguous tensor that is written later."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self.shape, self.dtype = tuple(shape), dtype
        #: Name of the entry, given when the content is written.
        self.key = ""

    def __reduce__(self) -> tuple[Any, ...]:
        stride = torch.empty(self.shape, device="meta").stride()
        storage = _Storage(self.key, self.dtype, torch.Size(self.shape).numel())
        return _rebuild_tensor_v2, (storage, 0, self.shape, stride, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        kind = torch.storage._dtype_to_storage_type_map()[value.dtype]
        return "storage", getattr(torch, kind), value.key, "cpu", value.count


class TorchFile:
    """A file that torch.load reads, open for its tensors.

    Args:
        content: plain values and mappings; each tensor a PromisedTensor, of which one object is in it once.
    """

    def __init__(self, path: Path, content: Any, promised: list[PromisedTensor]):
        self._file = open(path, "wb")
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        self._waiting = {}
        for number, tensor in enumerate(promised):
            tensor.key = str(number)
            self._waiting[tensor.key] = tensor
        table = io.BytesIO()
        _Pickler(table, protocol=2).dump(content)
        self._write("data.pkl", table.getvalue())
        self._write("byteorder", sys.byteorder.encode())
        self._write("version", b"3\n")

    def write(self, promised: PromisedTensor, tensor: Tensor) -> None:
        """Writes a promised tensor's elements."""
        assert tuple(tensor.shape) == promised.shape and tensor.dtype == promised.dtype
        del self._waiting[promised.key]
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        self._write(f"data/{promised.key}", flat.numpy().data)

    def close(self) -> None:
        """Completes the file and flushes it to disk; all promised tensors are written."""
        assert not self._waiting, f"promised and not written: {list(self._waiting)[:3]}"
        self._zip.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Closes the file without completing it; nothing happens if it is complete."""
        self._zip.fp = None  # or it would complete itself when it is let go
        self._file.close()

    def _write(self, name: str, data: bytes | memoryview) -> None:
        entry = zipfile.ZipInfo(f"{_ARCHIVE}/{name}")
        header = self._zip.start_dir + _LOCAL_HEADER_BYTES + len(entry.filename) + _ZIP64_BYTES + 4
        filling = -header % ALIGNMENT
        entry.extra = struct.pack("<HH", _FILLING, filling) + bytes(filling)
        with self._zip.open(entry, "w", force_zip64=True) as out:
            out.write(data)
