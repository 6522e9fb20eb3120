"""The plan of an export to Hugging Face, made before anything is read or written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_samoe.convert.hf.parts import Constant, Part
from megatron_samoe.convert.hf.target import Target
from megatron_samoe.convert.hf.tokenizer_files import TokenizerFiles
from megatron_samoe.convert.native import NativeModel
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors, StoredTensor


@dataclass(frozen=True)
class ExportPlan:
    """The files of an export, and the tensors in them.

    Attributes:
        source: of native tensors, already folded where the target wants it.
        native: what the source is.
        parts: foreign tensors by native name, in the order in which the source is best read.
        constants: foreign tensors that no native one makes up.
        tensors: all of them, in the order of writing.
        shards: for each weight file its tensors.
        tokenizer: its files; None to write none.
    """

    source: GlobalTensors
    native: NativeModel
    target: Target
    parts: Mapping[str, list[Part]]
    constants: tuple[Constant, ...]
    tensors: Mapping[str, StoredTensor]
    shards: Mapping[str, Mapping[str, StoredTensor]]
    tokenizer: TokenizerFiles | None

    @property
    def num_bytes(self) -> int:
        """Size of the weights."""
        return sum(t.num_bytes for t in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        embedding = next(iter(self.parts["embedding.word.weight"]))
        return self.tensors[embedding.name].dtype
