"""A folder that was opened: which format it is of, and its model's tensors under global names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_samoe.config.data import DataConfig
from megatron_samoe.dist_checkpointing.global_tensors import CheckpointReader, GlobalTensors, StoredTensor
from megatron_samoe.dist_checkpointing.loading import load_checkpoint
from megatron_samoe.dist_checkpointing.sharded_state import ShardedState
from megatron_samoe.parallel_state.state import ParallelState


@dataclass(frozen=True)
class Opened:
    """A model in a folder.

    Attributes:
        kind: name of its format.
        described: the format in words.
        directory: where its files are, which may be below the folder that was given.
        tensors: as the files have them.
        data: the options of its tokenizer, whose files are where they say.
        model: the tensors with `data` as their configuration's, and with the tokenizer's files.
        notes: lines that a user should know.
    """

    kind: str
    described: str
    directory: Path
    tensors: GlobalTensors
    data: DataConfig
    model: GlobalTensors
    notes: tuple[str, ...] = ()

    def load_into(self, state: ShardedState, parallel: ParallelState) -> None:
        """Fills this rank's parts of tensors; all ranks call it together.

        Raises:
            CheckpointError: a tensor is missing or has another shape, or a file is damaged; see `load_checkpoint`.
        """
        if isinstance(self.tensors, CheckpointReader):
            load_checkpoint(self.directory, state, parallel)
            return
        for name, parts in state.items():
            tensor = self.tensors.read(name)
            for part in parts:
                box = zip(part.offsets, part.local.shape, strict=True)
                part.local.copy_(tensor[tuple(slice(offset, offset + size) for offset, size in box)])


@dataclass(frozen=True)
class ReadTensors:
    """A model's tensors as `GlobalTensors`, each from a function."""

    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]
    train_state: Mapping[str, Any]
    attachments: Mapping[str, bytes]
    read: Callable[[str], Tensor]
