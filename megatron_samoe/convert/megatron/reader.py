"""Reads checkpoints of Megatron-LM's as global tensors: per-rank files (format `torch`) and `torch_dist`, of any layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.config.cli import to_mapping
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.convert.edited_model import validate_model
from megatron_samoe.convert.hf.parts import VOCABULARY
from megatron_samoe.convert.layer_experts import layer_of
from megatron_samoe.convert.megatron.arguments import from_arguments
from megatron_samoe.convert.megatron.dist_files import is_torch_dist, open_torch_dist
from megatron_samoe.convert.megatron.names import ExpertNames, Slice, slices_of
from megatron_samoe.convert.megatron.rank_files import find_iteration
from megatron_samoe.convert.megatron.rank_index import open_rank_files
from megatron_samoe.convert.megatron.stored import Entry, count
from megatron_samoe.convert.native import NativeModel, lossless_precision
from megatron_samoe.dist_checkpointing.global_tensors import StoredTensor
from megatron_samoe.dist_checkpointing.plausible import refuse_other_sizes
from megatron_samoe.errors import CheckpointError, ConfigError, naming_file, some
from megatron_samoe.optimizer.mixed_precision import LossScale


class MegatronReader:
    """A checkpoint of Megatron-LM's.

    Args:
        directory: the folder with latest_checkpointed_iteration.txt, or one iteration's.
        vocab_size: tokens that exist; what the checkpoint says, or the padded size, if not given.

    Attributes:
        notes: lines that a user should know.

    Raises:
        CheckpointError: it is not a checkpoint, is damaged or incomplete, or of a model that this program cannot compute.
        ConfigError: `vocab_size` does not fit.
    """

    def __init__(self, directory: Path, ckpt_step: int | None = None, vocab_size: int | None = None):
        self.directory = find_iteration(Path(directory), ckpt_step)
        opener = open_torch_dist if is_torch_dist(self.directory) else open_rank_files
        self._stored = stored = opener(self.directory)
        args, where = stored.arguments, f"{stored.where}'s arguments"
        self.arguments: Mapping[str, Any] = vars(args)
        with naming_file(where):
            config = from_arguments(args, str(stored.where))
        sizes = {"num_layers": config.model.num_layers, "hidden_size": config.model.hidden_size}
        names = {key: entry for entries in stored.index.values() for key, entry in entries.items()}
        shapes = {key: entry.shape for key, entry in names.items()}
        refuse_other_sizes(sizes, shapes, str(self.directory), "decoder.layers.")
        padded = count(args, "padded_vocab_size", 0, stored.where)
        # Other tools' checkpoints may be padded to something else than they say.
        divisor = math.gcd(padded, config.model.make_vocab_size_divisible_by)
        config = replace(config, model=replace(config.model, make_vocab_size_divisible_by=divisor))
        vocab = vocab_size or count(args, "vocab_size", padded, stored.where)
        if not 0 < vocab <= padded:
            raise ConfigError("--vocab-size", vocab, f"must be from 1 to the {padded} rows of {self.directory}")
        with naming_file(where):
            validate_model(config)
        self._layout = replace(stored.layout, experts=self._experts(config, set(names)))
        self._native = NativeModel(config, vocab)
        self._padded = padded
        samples = count(args, "consumed_train_samples", 0, stored.where, least=0)
        consumed = {"consumed_samples": samples, "consumed_tokens": samples * config.model.seq_length}
        state = {"iteration": stored.iteration, **consumed, "loss_scale": asdict(LossScale()), "vocab_size": vocab}
        self.train_state: Mapping[str, Any] = state
        self._parts = {name: self._find(name, tensor) for name, tensor in self._native.tensors.items()}
        self._refuse_rest()
        dtypes = [(name, e.key, e.dtype) for name, found in self._parts.items() for _, e in found]
        config, wider = lossless_precision(self._native, dtypes, str(self.directory))
        self.notes = [*stored.notes, *wider]
        self.config: Mapping[str, Any] = to_mapping(config)
        self.attachments: Mapping[str, bytes] = {}
        self.tensors: Mapping[str, StoredTensor] = NativeModel(config, vocab).tensors

    def read(self, name: str) -> Tensor:
        """Returns a tensor, put together from its parts."""
        tensor = self.tensors[name]
        full = torch.empty(self._file_shape(name, tensor.shape), dtype=tensor.dtype)
        for part, entry in sorted(self._parts[name], key=lambda pair: pair[1].folder):
            part.put(full, self._stored.read(entry))
        return full[: tensor.shape[0]].clone() if name in VOCABULARY else full

    def _experts(self, config: PretrainConfig, names: set[str]) -> ExpertNames:
        """Returns how experts are named.

        Raises:
            CheckpointError: layers share experts in a way that the arguments do not say, or their number is another one.
        """
        if config.moe.shares_experts:
            return "lent"
        if any(name.startswith("expert_pool.") for name in names):
            raise CheckpointError(
                f"{self.directory} has experts that layers share, and its arguments keep no expert_sharing: save the plug-in's "
                "arguments with the model."
            )
        ranks = self._stored.layout.expert_parallel
        if config.moe.expert_layout != "dense" and config.moe.most_experts % ranks:
            raise CheckpointError(
                f"{self._stored.where}: its arguments say {config.moe.most_experts} experts on {ranks} expert-parallel ranks, "
                "which have equal numbers in Megatron."
            )
        if any(name.endswith("mlp.experts.weight1") for name in names):
            return "legacy_grouped"
        return "stacked" if any(".mlp.experts.experts.linear_fc1." in name for name in names) else "sequential"

    def _file_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the full tensor's shape in the files: Megatron's vocabulary may be padded further."""
        return (self._padded, *shape[1:]) if name in VOCABULARY else shape

    def _find(self, name: str, stored: StoredTensor) -> list[tuple[Slice, Entry]]:
        """Returns a tensor's slices, each with its first entry.

        Raises:
            CheckpointError: one is missing or of another shape.
        """
        found = []
        shape = self._file_shape(name, stored.shape)
        for part in slices_of(name, shape, layer_of(name), self._layout, self._native.model):
            ranks = (entries for rank, entries in self._stored.index.items() if part.is_on(*rank))
            entry = next((entries[part.name] for entries in ranks if part.name in entries), None)
            if entry is None:
                of_rank = "" if part.tp is None else f" of tensor rank {part.tp}"
                raise CheckpointError(f"{self.directory} has no tensor {part.name}{of_rank}, for {name}.")
            if entry.shape != part.shape:
                raise CheckpointError(
                    f"{entry.folder}: {entry.key} is {list(entry.shape)}; its arguments say {list(part.shape)}."
                )
            found.append((part, entry))
        return found

    def _refuse_rest(self) -> None:
        """Raises CheckpointError naming tensors that no part of the model is."""
        index = self._stored.index.values()
        used = {id(entry) for found in self._parts.values() for _, entry in found}
        # Megatron's router has a bias wherever linear layers have one; ours never does.
        biases = [e for entries in index for key, e in entries.items() if key.endswith("mlp.router.bias")]
        if any(self._stored.read(entry).any() for entry in biases):
            raise CheckpointError(f"{self.directory} has routers with a bias, which this program's model lacks.")
        used |= {id(entry) for entry in biases}
        known = {key for entries in index for key, e in entries.items() if id(e) in used}
        rest = sorted({key for entries in index for key in entries} - known - {"output_layer.weight"})
        if rest:
            raise CheckpointError(f"{self.directory} has tensors that this program's model lacks: {some(rest)}.")
