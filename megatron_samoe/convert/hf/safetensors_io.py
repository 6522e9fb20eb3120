"""Files in the safetensors format, written and read one tensor at a time.

A file is the length of a JSON header (8 bytes, little endian), the header, and the tensors' bytes without holes. The
library's own writer wants all tensors of a file at once, and its reader maps the file into memory; neither fits a
conversion in the memory of two tensors.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_samoe.dist_checkpointing.global_tensors import StoredTensor
from megatron_samoe.errors import CheckpointError, is_odd_name, readable, shown
from megatron_samoe.parsing import parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK_BYTES = 16 << 20
FLUSH_BYTES = 64 << 20
#: Of a header, which takes some 25 times its bytes when it is read: 100,000 tensors.
_MAX_HEADER_BYTES = 16 << 20
#: Below this a header may be longer than the tensors that it describes.
_SMALL_HEADER_BYTES = 1 << 20


def header_of(tensors: Mapping[str, StoredTensor]) -> bytes:
    """Returns a file's header, its length in front, for tensors in the order in which they will be written."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.num_bytes],
        }
        start += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return struct.pack("<Q", len(text)) + text


class SafetensorsWriter:
    """A file that is written tensor by tensor, in the order in which they were announced.

    The disk gets what is there while later tensors come: every so many bytes a thread asks for them to be flushed, so
    that the flush at the end has little left to wait for.
    """

    def __init__(self, path: Path, tensors: Mapping[str, StoredTensor]):
        self._expected = iter(tensors.items())
        self._file: BinaryIO = open(path, "xb", buffering=0)
        self._flusher, self._unflushed_bytes = ThreadPoolExecutor(1), 0
        self._flush: Future[None] | None = None
        self._write(header_of(tensors))

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes the next tensor, or a view with its elements in order, in the dtype that was announced.

        What is no plain run of memory is copied block by block, so that a whole copy is never made.
        """
        expected, stored = next(self._expected)
        assert name == expected, f"{name}: announced {expected}"
        assert tensor.numel() == torch.Size(stored.shape).numel(), f"{name}: {list(tensor.shape)}"
        for block in _blocks(tensor):
            plain = block.to(stored.dtype).contiguous()
            self._write(plain.view(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Flushes the file to disk; every announced tensor must have been written."""
        left = next(self._expected, None)
        assert left is None, f"{left} was announced and not written"
        self._flusher.shutdown()
        if self._flush is not None:
            self._flush.result()  # raises what the disk said
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Closes a file that will be thrown away."""
        self._flusher.shutdown()
        self._file.close()

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        self._unflushed_bytes += view.nbytes
        while view.nbytes:
            view = view[self._file.write(view) :]
        if self._unflushed_bytes >= FLUSH_BYTES and (self._flush is None or self._flush.done()):
            if self._flush is not None:
                self._flush.result()
            self._unflushed_bytes = 0
            self._flush = self._flusher.submit(os.fdatasync, self._file.fileno())


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Yields a tensor in order in pieces of a size that may be copied, along its first dims."""
    if tensor.numel() == 0:
        return
    if tensor.nbytes <= BLOCK_BYTES or tensor.dim() == 0:
        yield tensor
    elif tensor.nbytes // tensor.shape[0] > BLOCK_BYTES:
        for part in tensor:
            yield from _blocks(part)
    else:
        yield from tensor.split(BLOCK_BYTES // (tensor.nbytes // tensor.shape[0]))


class SafetensorsReader:
    """A file whose tensors are read one at a time.

    Raises:
        CheckpointError: it is no such file, or its header does not describe it.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                header, self._start = self._read_header(file)
                self._num_bytes = os.fstat(file.fileno()).st_size - self._start
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
        self._offsets: dict[str, int] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for name, entry in header.items():
            if name != "__metadata__":
                self._add(name, entry)

    def _read_header(self, file: BinaryIO) -> tuple[dict[str, object], int]:
        prefix, rest = file.read(8), os.fstat(file.fileno()).st_size - 8
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= rest:
            raise CheckpointError(f"{self.path} is not a safetensors file, or is cut off: it has no whole header.")
        if length > min(_MAX_HEADER_BYTES, max(_SMALL_HEADER_BYTES, rest - length)):
            raise CheckpointError(
                f"{self.path} is not read: its header has {length:,} bytes for {rest - length:,} bytes of tensors. A header has at "
                f"most {_MAX_HEADER_BYTES:,}, and is not longer than its tensors."
            )
        text = file.read(length)
        try:
            header = parse_json(text)
        except ValueError:
            header = None
        if len(text) != length or not isinstance(header, dict):
            raise CheckpointError(f"{self.path} is not a safetensors file, or is cut off: its header cannot be read.")
        return header, 8 + length

    def _add(self, name: str, entry: object) -> None:
        try:
            fields: Any = entry
            kind, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
            legal = all(type(n) is int and 0 <= n < 2**62 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            legal = False
        if is_odd_name(name) or not legal:
            raise CheckpointError(f"{self.path} is damaged: its header's entry for {readable(name)} is not legal.")
        if not isinstance(kind, str) or kind not in DTYPES:
            raise CheckpointError(
                f"{self.path}: {name} has dtype {shown(kind)}; {', '.join(DTYPES)} are read (quantized weights are not)."
            )
        stored = StoredTensor(shape, DTYPES[kind])
        if end - begin != stored.num_bytes or end > self._num_bytes:
            raise CheckpointError(f"{self.path} is damaged or cut off: {name} does not lie within it.")
        self.tensors[name], self._offsets[name] = stored, begin

    def read(self, name: str) -> Tensor:
        """Returns a tensor of its own memory; CheckpointError where the file has become shorter."""
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        if not tensor.numel():
            return tensor
        view = tensor.view(-1).view(torch.uint8).numpy().data
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._start + self._offsets[name])
            while view.nbytes:
                count = file.readinto(view)
                if not count:
                    raise CheckpointError(f"{self.path} is cut off within {name}.")
                view = view[count:]
        return tensor
