"""A full model, tensor by tensor, in one process, as conversion, surgery and inspection read and write it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_samoe.config.checkpoint import CheckpointConfig
from megatron_samoe.dist_checkpointing import saving, store
from megatron_samoe.dist_checkpointing.loading import read_part
from megatron_samoe.dist_checkpointing.plausible import refuse_other_sizes
from megatron_samoe.dist_checkpointing.sharded_state import UnreadTensor
from megatron_samoe.dist_checkpointing.table_of_contents import METADATA, read_table
from megatron_samoe.errors import CheckpointError, shown
from megatron_samoe.parallel_state.state import single_process_state


@dataclass(frozen=True)
class StoredTensor:
    """The description of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return self.num_elements * self.dtype.itemsize

    @property
    def num_elements(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def dtype_name(self) -> str:
        """The dtype as users write it."""
        return name_of(self.dtype)


def name_of(dtype: torch.dtype) -> str:
    """Returns a dtype as users write it."""
    return str(dtype).removeprefix("torch.")


class GlobalTensors(Protocol):
    """A source of a model's tensors under their global names.

    Attributes:
        tensors: descriptions of the tensors by name, in the order to read them.
        config: configuration of the run, as in a checkpoint's config.yaml.
        train_state: plain values, as in its train_state.json.
        attachments: other files, by their path in a checkpoint.
    """

    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def train_state(self) -> Mapping[str, Any]: ...

    @property
    def attachments(self) -> Mapping[str, bytes]: ...

    def read(self, name: str) -> Tensor:
        """Returns a full tensor on the CPU, and keeps no copy."""


class DistributedTensors:
    """Tensors in a folder of torch.distributed.checkpoint, saved in any layout.

    Attributes:
        tensors: descriptions by name.

    Raises:
        CheckpointError: its table of contents is missing, damaged, or names other classes than its own.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._table = read_table(directory)
        self.tensors: Mapping[str, StoredTensor] = {
            name: StoredTensor(parted.shape, parted.dtype) for name, parted in self._table.tensors.items()
        }

    def read(self, name: str, at: tuple[int, ...] = ()) -> Tensor:
        """Returns a full tensor, or the part of it at leading indices; only files that have some of it are read.

        Raises:
            CheckpointError: a file is damaged, or no tensor has that name.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.directory} has no tensor {name}.")
        stored, parted, depth, part = self.tensors[name], self._table.tensors[name], len(at), None
        for chunk in parted.parts:
            inner = tuple(i - offset for i, offset in zip(at, chunk.offsets[:depth], strict=True))
            if all(0 <= i < size for i, size in zip(inner, chunk.sizes[:depth], strict=True)):
                taken = read_part(self.directory, name, parted, chunk)[inner]
                if taken.shape == stored.shape[depth:]:
                    return taken
                if part is None:
                    part = torch.empty(stored.shape[depth:], dtype=stored.dtype)
                box = zip(chunk.offsets[depth:], chunk.sizes[depth:], strict=True)
                part[tuple(slice(offset, offset + size) for offset, size in box)] = taken
        return torch.empty(stored.shape[depth:], dtype=stored.dtype) if part is None else part

    def read_object(self, name: str) -> bytes | None:
        """Returns an object as it was saved, which runs no code; None where the folder has none of that name."""
        stored = self._table.objects.get(name)
        if stored is None:
            return None
        try:
            with open(self.directory / stored.file, "rb") as file:
                file.seek(stored.start)
                return file.read(stored.length)
        except OSError as error:
            raise CheckpointError(f"{self.directory / stored.file} cannot be read: {error.strerror}.") from None


class CheckpointReader(DistributedTensors):
    """A checkpoint of this program as global tensors, saved in any layout.

    Args:
        directory: of one checkpoint (`iter_NNNNNNN`).

    Raises:
        CheckpointError: the folder is not a checkpoint of this program, is damaged, or has a newer format.
    """

    def __init__(self, directory: Path):
        self.config: Mapping[str, Any] = store.read_config(directory)
        self.train_state: Mapping[str, Any] = store.read_train_state(directory)
        super().__init__(directory)
        self._refuse_other_sizes()
        self.attachments: Mapping[str, bytes] = store.attachments_of(directory)

    def _refuse_other_sizes(self) -> None:
        model, moe = self.config.get("model") or {}, self.config.get("moe") or {}
        given = {name: model.get(name) for name in ("num_layers", "hidden_size")}
        if moe.get("expert_layout", "dense") != "dense":
            given["num_experts"] = moe.get("num_experts")
        sizes = {name: size for name, size in given.items() if type(size) is int}
        shapes = {name: stored.shape for name, stored in self.tensors.items()}
        refuse_other_sizes(sizes, shapes, str(self.directory / store.CONFIG), "layers.")
        vocab_size, words = self.train_state.get("vocab_size"), shapes.get("embedding.word.weight")
        if words and vocab_size is not None and not vocab_size <= words[0]:
            raise CheckpointError(
                f"{self.directory / store.TRAIN_STATE} says vocab_size is {shown(vocab_size)}; there are {words[0]} embeddings."
            )

    def verify(self) -> list[str]:
        """Returns a line for each file that is missing, differs from what was written, or cannot be compared with it."""
        stored = [part for parted in self._table.tensors.values() for part in parted.parts]
        files = {part.file for part in (*stored, *self._table.objects.values())}
        used = {METADATA, store.CONFIG, *files}
        unknown = sorted(used - self.train_state["digests"].keys())
        return [
            *store.damaged_files(self.directory, single_process_state()),
            *(f"{name} has no digest in {store.TRAIN_STATE}" for name in unknown),
        ]


def write_checkpoint(root: Path, iteration: int, source: GlobalTensors) -> Path:
    """Writes a source as a checkpoint that training and inference load in any layout; returns its folder.

    Tensors are read and written one at a time; the checkpoint appears whole or not at all.

    Raises:
        CheckpointError: `root` has that iteration already or cannot be written, or the disk is too small.
    """
    if store.iteration_dir(root, iteration).exists():
        raise CheckpointError(f"{store.iteration_dir(root, iteration)} exists; give another folder to write to.")
    store.probe_save_dir(str(root))

    def unread(name: str, stored: StoredTensor) -> UnreadTensor:
        return UnreadTensor(lambda: source.read(name), stored.shape, stored.dtype)

    state = {name: [unread(name, stored)] for name, stored in source.tensors.items()}
    train_state = {k: v for k, v in source.train_state.items() if k not in ("format_version", "digests", "digest")}
    return saving.save_checkpoint(
        CheckpointConfig(save=str(root)),
        iteration,
        state,
        source.config,
        train_state,
        single_process_state(),
        source.attachments,
    )
