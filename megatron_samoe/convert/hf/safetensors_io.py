"""Files in the safetensors format, written and read one tensor at a time.

A file is the length of a JSON header (8 bytes, little endian), the header, and the tensors' bytes without holes. The
library reads headers. Its writer wants all tensors of a file at once, and its tensors are maps of the file, whose pages
count as memory; neither fits a conversion in the memory of two tensors.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_samoe.dist_checkpointing.global_tensors import StoredTensor
from megatron_samoe.errors import CheckpointError, is_odd_name, readable

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
#: Of a header: 100,000 tensors.
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

    The disk gets what is there while later tensors come: after a fixed number of bytes a thread asks for them to be flushed, so
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

        A tensor that is not contiguous is copied block by block, so that no full copy is made.
        """
        expected, stored = next(self._expected)
        assert name == expected, f"{name}: announced {expected}"
        assert tensor.numel() == torch.Size(stored.shape).numel(), f"{name}: {list(tensor.shape)}"
        for block in _blocks(tensor):
            plain = block.to(stored.dtype).contiguous()
            self._write(plain.view(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Flushes the file to disk, of which every announced tensor must have been written; after an error it only closes it."""
        self._flusher.shutdown()
        with self._file:
            if error is None:
                left = next(self._expected, None)
                assert left is None, f"{left} was announced and not written"
                if self._flush is not None:
                    self._flush.result()  # raises what the disk said
                os.fsync(self._file.fileno())

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
        CheckpointError: the library refuses its header, or the header holds what no model's file does.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            offset = self._start_of_tensors()
            with safe_open(path, framework="pt") as file:
                # The library has checked that the tensors lie one after the other, without holes, up to the end.
                described = {name: file.get_slice(name) for name in file.offset_keys()}
                header = {name: (entry.get_dtype(), tuple(entry.get_shape())) for name, entry in described.items()}
        except SafetensorError as error:
            reason = str(error).removeprefix("Error while deserializing header: ")[:300]
            raise CheckpointError(f"{path} is not a safetensors file, is damaged, or is cut off: {reason}.") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
        except MemoryError:  # of addresses: the library maps the file
            raise CheckpointError(f"{path} cannot be read: it is larger than this process may map.") from None
        self._offsets: dict[str, int] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for name, (kind, shape) in header.items():
            if is_odd_name(name):
                raise CheckpointError(f"{path} is damaged: its header's entry for {readable(name)} is not legal.")
            if kind not in DTYPES:
                raise CheckpointError(
                    f"{path}: {name} has dtype {kind!r}; {', '.join(DTYPES)} are read (quantized weights are not)."
                )
            self.tensors[name], self._offsets[name] = StoredTensor(shape, DTYPES[kind]), offset
            offset += self.tensors[name].num_bytes

    def _start_of_tensors(self) -> int:
        """Returns where the tensors begin, after refusing a header that would take much memory."""
        with open(self.path, "rb") as file:
            prefix, rest = file.read(8), os.fstat(file.fileno()).st_size - 8
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if 0 < length <= rest and length > min(_MAX_HEADER_BYTES, max(_SMALL_HEADER_BYTES, rest - length)):
            raise CheckpointError(
                f"{self.path} is not read: its header has {length:,} bytes for {rest - length:,} bytes of tensors. A header has at "
                f"most {_MAX_HEADER_BYTES:,}, and is not longer than its tensors."
            )
        return 8 + length

    def read(self, name: str) -> Tensor:
        """Returns a tensor of its own memory; CheckpointError where the file has become shorter."""
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        if not tensor.numel():
            return tensor
        view = tensor.view(-1).view(torch.uint8).numpy().data
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._offsets[name])
            while view.nbytes:
                count = file.readinto(view)
                if not count:
                    raise CheckpointError(f"{self.path} is cut off within {name}.")
                view = view[count:]
        return tensor
