"""The table of contents of torch's distributed checkpoints, read without running code from it.

torch keeps it as a pickle, and unpickling runs any code that the file names. Here it may name only the few classes that such
tables consist of; plans of saving, which Megatron-Core keeps with it, are passed over.
"""

from __future__ import annotations

import functools
import io
import math
import os
import pickle
import pickletools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_samoe.errors import CheckpointError, is_odd_name, shown
from megatron_samoe.parsing import read_file

METADATA = ".metadata"
#: Some million parts of tensors.
MAX_METADATA_BYTES = 1 << 30
_METADATA_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},  # Python 3.13 says so
    "torch": {"Size"},
}


#: Packages whose plans of saving Megatron-Core keeps beside the table. Nothing of them is needed.
_OF_PLANS = ("torch.distributed.checkpoint.", "megatron.core.", "nvidia_resiliency_ext.")


class Inert:
    """Stands for an object that is passed over: it takes any arguments and does nothing."""

    def __init__(self, *args: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        """Forgets the state."""


class _AnyProperties(TensorProperties):
    """A tensor's properties as any release of torch saved them: later ones add to the tuple, and earlier ones cannot take it."""

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(tuple(state)[:5])
        self.__class__ = TensorProperties  # type: ignore[assignment]


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = name in _METADATA_NAMES.get(module, ())
        if not known and module.startswith(_OF_PLANS):
            return Inert
        if not known and not (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            raise CheckpointError(
                f"The checkpoint's {METADATA} names {module}.{name}, which no table of contents needs: it is not loaded, "
                "since it could run any code."
            )
        # Only Python 3.13 has a module of this name.
        found = super().find_class("pathlib" if module == "pathlib._local" else module, name)
        return _AnyProperties if found is TensorProperties else found


def read_metadata(directory: str | os.PathLike) -> Metadata:
    """Returns a checkpoint's table of contents.

    Raises:
        CheckpointError: the table is missing, damaged, or names anything else than its classes.
    """
    path = Path(directory) / METADATA
    try:
        content = read_file(path, MAX_METADATA_BYTES)
        refuse_hollow(content)
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}.") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path} is damaged: it holds {type(metadata).__name__}.")
    try:
        problem = _problem_of(metadata)
    except AttributeError as error:  # an object of the right class, unpickled without its fields
        problem = f"an entry has no {error.name}"
    if problem:
        raise CheckpointError(f"{path} is damaged: {problem}.")
    return metadata


@functools.lru_cache(maxsize=1)  # it takes a second for a megabyte, and a load reads the table three times
def refuse_hollow(content: bytes) -> None:
    """Raises ValueError where a pickle announces more data than it holds: a few bytes can demand gigabytes."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(argument or 0) <= len(content):
            raise ValueError("it numbers more values than it has bytes")


def _problem_of(metadata: Metadata) -> str:
    """Returns what is wrong with a table of contents that this program cannot have written; an empty string where
    nothing is.
    """
    entries, places = metadata.state_dict_metadata, metadata.storage_data
    if not isinstance(entries, dict) or not isinstance(places, dict):
        return "it is no table of tensors"
    for index, place in places.items():
        path = getattr(place, "relative_path", None)
        if not isinstance(index, MetadataIndex) or not isinstance(place, _StorageInfo) or not isinstance(path, str):
            return "its table of places is none"
        if os.path.basename(path) != path or not _are_sizes((place.offset, place.length)):
            return f"{shown(path)} from {shown(place.offset)} is no place in a file of its folder"
    for name, entry in entries.items():
        if is_odd_name(name):
            return f"a tensor is called {shown(name)}"
        if isinstance(entry, TensorStorageMetadata):
            problem = _problem_of_tensor(name, entry, places)
            if problem:
                return f"{name} {problem}"
        elif not isinstance(entry, BytesStorageMetadata):
            return f"{name} is a {type(entry).__name__}"
    if metadata.storage_meta is not None and not isinstance(metadata.storage_meta, StorageMeta):
        return f"it describes its storage by {shown(metadata.storage_meta)}"
    return ""


def _problem_of_tensor(name: str, entry: TensorStorageMetadata, places: dict[Any, Any]) -> str:
    if not isinstance(entry.properties, TensorProperties) or not isinstance(entry.properties.dtype, torch.dtype):
        return "has no properties, or no type of its elements"
    if not isinstance(entry.size, tuple) or not _are_sizes(entry.size) or not isinstance(entry.chunks, list):
        return "has no sizes"
    covered = 0
    for chunk in entry.chunks:
        if not isinstance(chunk, ChunkStorageMetadata):
            return "has a part that is none"
        offsets, sizes = chunk.offsets, chunk.sizes
        legal = isinstance(offsets, tuple) and isinstance(sizes, tuple) and _are_sizes((*offsets, *sizes))
        if (
            not legal
            or not len(offsets) == len(sizes) == len(entry.size)
            or any(offset + size > whole for offset, size, whole in zip(offsets, sizes, entry.size, strict=True))
        ):
            return f"has a part of {shown(sizes)} at {shown(offsets)}, which does not lie in its {list(entry.size)}"
        if MetadataIndex(name, torch.Size(offsets)) not in places:
            return "has a part that is in no file"
        covered += math.prod(sizes)
    return "" if covered == math.prod(entry.size) else "is not covered by its parts"


def _are_sizes(values: Iterable[object]) -> bool:
    return all(type(value) is int and 0 <= value < 2**62 for value in values)
