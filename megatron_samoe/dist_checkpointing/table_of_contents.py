"""The table of contents of torch's distributed checkpoints, read without running code from it.

torch keeps it as a pickle of its own classes, and unpickling runs any code that the file names. Here those classes are
replaced by records without methods; plans of saving, which Megatron-Core keeps with them, are passed over. Nor is torch's
package of checkpoints imported, which takes most of a second: DTensor and sympy come with it.
"""

from __future__ import annotations

import functools
import io
import math
import os
import pickle
import pickletools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_samoe.errors import CheckpointError, is_odd_name, shown
from megatron_samoe.parsing import read_file

METADATA = ".metadata"
#: Some million parts of tensors.
MAX_METADATA_BYTES = 1 << 30


@dataclass(frozen=True)
class StoredPart:
    """A part of a global tensor, or an object, in a file of the checkpoint's folder.

    Attributes:
        start, length: bytes of the file.
        offsets, sizes: of the part in its global tensor; empty for an object.
    """

    file: str
    start: int
    length: int
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class PartedTensor:
    """A global tensor, and its parts, which cover it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[StoredPart, ...]


@dataclass(frozen=True)
class TableOfContents:
    """Everything that a checkpoint holds, by name."""

    tensors: Mapping[str, PartedTensor]
    objects: Mapping[str, StoredPart]


class Inert:
    """Stands for an object that is passed over: it takes any arguments and does nothing."""

    def __init__(self, *args: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        """Forgets the state."""


class _Record:
    """An object of the table: attributes as they were saved."""


class _Table(_Record):
    state_dict_metadata: Any
    storage_data: Any
    storage_meta: Any = None


class _Tensor(_Record):
    properties: Any
    size: Any
    chunks: Any


class _Bytes(_Record):
    pass


class _Chunk(_Record):
    offsets: Any
    sizes: Any


class _StorageInfo(_Record):
    relative_path: Any
    offset: Any
    length: Any
    transform_descriptors: Any = None


class _Properties(_Record):
    """A tensor's properties: of the tuple that torch saves, to which later releases add, only the dtype counts."""

    def __setstate__(self, state: Any) -> None:
        self.dtype = next(iter(state))


class _Index(_Record):
    fqn: Any
    offset: Any = None  # an object has none

    def __hash__(self) -> int:
        return hash((self.fqn, self.offset))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Index) and (self.fqn, self.offset) == (other.fqn, other.offset)


_TORCH = "torch.distributed.checkpoint."
_CLASSES: dict[tuple[str, str], Any] = {
    (_TORCH + "metadata", "Metadata"): _Table,
    (_TORCH + "metadata", "TensorStorageMetadata"): _Tensor,
    (_TORCH + "metadata", "BytesStorageMetadata"): _Bytes,
    (_TORCH + "metadata", "TensorProperties"): _Properties,
    (_TORCH + "metadata", "ChunkStorageMetadata"): _Chunk,
    (_TORCH + "metadata", "MetadataIndex"): _Index,
    (_TORCH + "filesystem", "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): Inert,
    ("pathlib", "PosixPath"): Inert,
    ("pathlib", "PurePosixPath"): Inert,
    ("pathlib._local", "PosixPath"): Inert,  # Python 3.13 says so
    ("pathlib._local", "PurePosixPath"): Inert,
}
#: Packages of plans of saving, and of what else nothing is needed.
_PASSED_OVER = (_TORCH, "megatron.core.", "nvidia_resiliency_ext.")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _CLASSES.get((module, name))
        if found is None and module == "torch":
            dtype = getattr(torch, name, None)
            found = dtype if isinstance(dtype, torch.dtype) else None
        if found is None and module.startswith(_PASSED_OVER):
            return Inert
        if found is None:
            raise CheckpointError(
                f"The checkpoint's {METADATA} names {module}.{name}, which no table of contents needs: it is not loaded, "
                "since it could run any code."
            )
        return found


def read_table(directory: str | os.PathLike) -> TableOfContents:
    """Returns a checkpoint's table of contents.

    Raises:
        CheckpointError: the table is missing, damaged, or names anything else than its classes.
    """
    path = Path(directory) / METADATA
    try:
        return _parsed(read_file(path, MAX_METADATA_BYTES))
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    except _DamagedError as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}.") from None


class _DamagedError(ValueError):
    """A table of contents that this program and torch cannot have written; the message says what is wrong."""


@functools.lru_cache(maxsize=1)  # it takes a second for a megabyte, and a load reads the table three times
def _parsed(content: bytes) -> TableOfContents:
    refuse_hollow(content)
    table = _Unpickler(io.BytesIO(content)).load()
    if not isinstance(table, _Table):
        raise _DamagedError(f"it holds {type(table).__name__}")
    try:
        entries, files_by_index = table.state_dict_metadata, table.storage_data
        _require(isinstance(entries, dict) and isinstance(files_by_index, dict), "it is not a table of tensors")
        files = {index: _file_of(index, info) for index, info in files_by_index.items()}
        for name in entries:
            _require(not is_odd_name(name), f"a tensor is called {shown(name)}")
        tensors = {name: _tensor(name, e, files) for name, e in entries.items() if not isinstance(e, _Bytes)}
        objects = {name: files[_index(name, None)] for name, e in entries.items() if isinstance(e, _Bytes)}
    except AttributeError as error:  # an object of the right class, unpickled without its fields
        raise _DamagedError(f"an entry has no {error.name}") from None
    except KeyError as error:
        raise _DamagedError(f"{error.args[0].fqn} has a part that is in no file") from None
    return TableOfContents(tensors, objects)


def refuse_hollow(content: bytes) -> None:
    """Raises ValueError where a pickle announces more data than it holds: a few bytes can demand gigabytes."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(argument or 0) <= len(content):
            raise ValueError("it numbers more values than it has bytes")


def _require(is_right: bool, problem: str) -> None:
    if not is_right:
        raise _DamagedError(problem)


def _index(name: str, offset: torch.Size | None) -> _Index:
    index = _Index()
    index.fqn, index.offset = name, offset
    return index


def _file_of(index: Any, info: Any) -> StoredPart:
    is_info = isinstance(index, _Index) and isinstance(info, _StorageInfo) and isinstance(info.relative_path, str)
    _require(is_info, "its table of files is malformed")
    path, start, length = info.relative_path, info.offset, info.length
    in_folder = os.path.basename(path) == path and _are_sizes((start, length))
    _require(in_folder, f"{shown(path)} from {shown(start)} is not inside a file of its folder")
    _require(not info.transform_descriptors, f"{shown(path)} was written through a transform, which is not read")
    return StoredPart(path, start, length)


def _tensor(name: str, entry: Any, files: Mapping[_Index, StoredPart]) -> PartedTensor:
    _require(isinstance(entry, _Tensor), f"{name} is a {type(entry).__name__}")
    is_typed = isinstance(entry.properties, _Properties) and isinstance(entry.properties.dtype, torch.dtype)
    _require(is_typed, f"{name} has no properties, or no type of its elements")
    is_sized = isinstance(entry.size, tuple) and _are_sizes(entry.size) and isinstance(entry.chunks, list)
    _require(is_sized, f"{name} has no sizes")
    parts = tuple(_part(name, entry.size, chunk, files) for chunk in entry.chunks)
    covered = sum(math.prod(part.sizes) for part in parts)
    _require(covered == math.prod(entry.size), f"{name} is not covered by its parts")
    return PartedTensor(tuple(entry.size), entry.properties.dtype, parts)


def _part(name: str, shape: tuple[int, ...], chunk: Any, files: Mapping[_Index, StoredPart]) -> StoredPart:
    _require(isinstance(chunk, _Chunk), f"{name} has a malformed part")
    offsets, sizes = chunk.offsets, chunk.sizes
    is_box = isinstance(offsets, tuple) and isinstance(sizes, tuple) and _are_sizes((*offsets, *sizes))
    fits = (
        is_box
        and len(offsets) == len(sizes) == len(shape)
        and all(offset + size <= full for offset, size, full in zip(offsets, sizes, shape, strict=True))
    )
    _require(fits, f"{name} has a part of {shown(sizes)} at {shown(offsets)}, which does not lie in its {list(shape)}")
    at = files[_index(name, torch.Size(offsets))]
    return StoredPart(at.file, at.start, at.length, tuple(offsets), tuple(sizes))


def _are_sizes(values: Iterable[object]) -> bool:
    return all(type(value) is int and 0 <= value < 2**62 for value in values)
