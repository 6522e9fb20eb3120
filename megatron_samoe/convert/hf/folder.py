"""A folder as transformers writes it: config.json and weight files, read one tensor at a time."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_samoe.convert.hf.safetensors_io import SafetensorsReader
from megatron_samoe.dist_checkpointing.global_tensors import StoredTensor
from megatron_samoe.dist_checkpointing.saved_tensor import is_plain, refuse_packed, refuse_repacked, why_not_loaded
from megatron_samoe.errors import CheckpointError, is_odd_name, readable, shown
from megatron_samoe.parsing import MAX_FILE_BYTES, parse_json, read_file

CONFIG, GENERATION_CONFIG, ADAPTER = "config.json", "generation_config.json", "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_WEIGHTS, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
#: An index of 100,000 tensors has some 10 MB.
MAX_JSON_BYTES = MAX_FILE_BYTES


class WeightFile(Protocol):
    """Tensors by name, each read when it is asked for."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...

    def read(self, name: str) -> Tensor:
        """Returns a tensor of its own memory."""


class PickledFile:
    """A file that torch.save wrote, mapped into memory; only tensors are unpickled, nothing else is run.

    Raises:
        CheckpointError: it holds anything else than tensors, or is damaged.
    """

    def __init__(self, path: Path):
        try:
            refuse_packed(path)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises several kinds
            raise CheckpointError(
                f"{path} cannot be read as plain tensors: {why_not_loaded(error, path)}. A pickle can run any code, so "
                "nothing else is loaded from it: save the model anew with transformers, as safetensors."
            ) from None
        if not isinstance(state, Mapping) or not all(isinstance(k, str) and is_plain(t) for k, t in state.items()):
            raise CheckpointError(f"{path} holds more than a mapping of names to tensors; that is not a model's file.")
        odd = [name for name in state if is_odd_name(name)]
        if odd:
            raise CheckpointError(f"{path} is damaged: a tensor in it is called {readable(odd[0])}.")
        try:
            refuse_repacked(path, state.values())
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{path} is damaged: {error}.") from None
        self._state = state
        self.tensors = {name: StoredTensor(tuple(t.shape), t.dtype) for name, t in state.items()}

    def read(self, name: str) -> Tensor:
        """Returns a copy of a tensor."""
        return self._state[name].clone()


class HFFolder:
    """The tensors and the configuration of a folder, as they are.

    Raises:
        CheckpointError: the folder is not one that transformers wrote, or a file is missing or damaged.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.config = read_json(directory / CONFIG)
        self._file_of: dict[str, WeightFile] = {}
        for path in self._weight_files():
            file: WeightFile = PickledFile(path) if path.suffix == ".bin" else SafetensorsReader(path)
            if twice := self._file_of.keys() & file.tensors.keys():
                raise CheckpointError(
                    f"{directory} holds {min(twice)} in two files, and {path.name} is one of them: remove one of the two."
                )
            self._file_of |= dict.fromkeys(file.tensors, file)
        self.tensors = {name: file.tensors[name] for name, file in self._file_of.items()}

    def read(self, name: str) -> Tensor:
        """Returns a tensor by its own name."""
        return self._file_of[name].read(name)

    def _weight_files(self) -> list[Path]:
        # In transformers' order: a single file goes before an index, which an earlier save may have left.
        for single, index in ((WEIGHTS, INDEX), (PICKLED_WEIGHTS, PICKLED_INDEX)):
            if (self.directory / single).is_file():
                return [self.directory / single]
            if (self.directory / index).is_file():
                return self._indexed(self.directory / index)
        raise CheckpointError(
            f"{self.directory} has a {CONFIG} and no weights: {WEIGHTS}, {INDEX}, {PICKLED_WEIGHTS} or {PICKLED_INDEX} "
            "is needed."
        )

    def _indexed(self, index: Path) -> list[Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{index} is damaged: it has no weight_map from names to files.")
        names = sorted(set(weight_map.values()))
        odd = [name for name in names if Path(name).name != name or len(name.encode()) > 255 or is_odd_name(name)]
        if odd:
            raise CheckpointError(f"{index} names {shown(odd[0])}, which is not a file of its folder.")
        missing = [name for name in names if not (self.directory / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{index} names {missing[0]}, which is not there ({len(missing)} of {len(names)} files)."
            )
        return [self.directory / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON file's mapping; CheckpointError without one."""
    try:
        content = parse_json(read_file(path, MAX_JSON_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds {type(content).__name__} in place of a mapping.")
    return content


def is_hf_folder(directory: Path) -> bool:
    """Returns whether a folder looks like one that transformers wrote."""
    return (directory / CONFIG).is_file()
