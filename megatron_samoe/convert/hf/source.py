"""A Hugging Face model as a source of native tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.config.cli import apply_mapping, to_mapping
from megatron_samoe.config.data import DataConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.validate import refuse_unknown
from megatron_samoe.convert.edited_model import FRACTIONS, moe_layers, uniform_fractions, validate_model
from megatron_samoe.convert.hf.families import Family, families
from megatron_samoe.convert.hf.families.entries import completed
from megatron_samoe.convert.hf.folder import ADAPTER, CONFIG, HFFolder
from megatron_samoe.convert.hf.parts import Constant, Part, Parts, join, parts_of
from megatron_samoe.convert.hf.sidecar import SIDECAR, Remembered, read_sidecar
from megatron_samoe.convert.native import NativeModel, lossless_precision
from megatron_samoe.datasets.carried_tokenizer import chat_in, chat_of
from megatron_samoe.datasets.chat_template import read_chat
from megatron_samoe.dist_checkpointing.global_tensors import StoredTensor
from megatron_samoe.dist_checkpointing.plausible import refuse_other_sizes
from megatron_samoe.errors import CheckpointError, ConfigError, naming_file, nearest
from megatron_samoe.optimizer.mixed_precision import LossScale

#: The output matrix, which files may hold although it is the embedding.
_HEADS = ("lm_head.weight", "embed_out.weight")


class HFSource:
    """The native model that a folder of transformers describes; see `GlobalTensors`.

    Attributes:
        family: of the folder's class.
        notes: lines that a user should know.

    Raises:
        ConfigError: the model does something that ours does not.
        CheckpointError: tensors are missing, have other shapes, or are not known; or files are damaged.
    """

    def __init__(self, directory: Path):
        self.folder = HFFolder(directory)
        _refuse_adapter(directory)
        with naming_file(directory / CONFIG):
            self._describe(directory)

    def _describe(self, directory: Path) -> None:
        """Reads what the folder's files say of the model."""
        self.family = family_of(self.folder.config)
        self.notes: list[str] = []
        remembered = read_sidecar(directory / SIDECAR)
        native = derived_model(self.family, self.folder.config)
        if remembered is not None and not self._describes(remembered, native):
            self.notes.append(f"{SIDECAR} describes another model than {CONFIG}, which is followed.")
            remembered = None
        if remembered is not None:
            native = _legal(remembered.native)
        sizes = {"num_layers": native.model.num_layers, "hidden_size": native.model.hidden_size}
        if any(native.is_moe):
            sizes["num_experts"] = max(place.num_experts for place in moe_layers(native.config))
        shapes = {name: stored.shape for name, stored in self.folder.tensors.items()}
        refuse_other_sizes(sizes, shapes, f"{directory / CONFIG}")
        tied = not native.model.untie_embeddings_and_output_weights
        self._parts_of = parts_of(self._located(self._named_parts(native), tied))
        stored = [(p.native, p.name, self.folder.tensors[p.name].dtype) for ps in self._parts_of.values() for p in ps]
        config, wider = lossless_precision(native, stored, str(directory))
        self.notes += wider
        self.native = replace(native, config=config)
        self._fractions_LE = self._expert_fractions(remembered)
        self.tensors: dict[str, StoredTensor] = dict(self.native.tensors)
        if self._fractions_LE is not None:
            self.tensors[FRACTIONS] = StoredTensor(tuple(self._fractions_LE.shape), torch.float32)
        self.config: Mapping[str, Any] = to_mapping(self.native.config)
        self.attachments: Mapping[str, bytes] = chat_in(directory, ".")
        read_chat(chat_of(self.attachments), directory)  # which says what is wrong with a file
        self.train_state: Mapping[str, Any] = self._train_state(remembered)

    def _describes(self, remembered: Remembered, derived: NativeModel) -> bool:
        """Whether a remembered model is the one of config.json, as far as that says."""
        native, write = remembered.native, self.family.write_config
        if self.family.misfits(native):
            return False
        # A balance loss changes nothing that is computed, and some files have no entry for it.
        untold = {"router_aux_loss_coef"} - self.folder.config.keys()
        ours, theirs = ({k: v for k, v in write(m).items() if k not in untold} for m in (native, derived))
        return ours == theirs

    def read(self, name: str) -> Tensor:
        """Returns a native tensor, put together from the folder's."""
        if name == FRACTIONS:
            assert self._fractions_LE is not None
            return self._fractions_LE
        stored = self.tensors[name]
        return join(self._parts_of[name], stored.shape, stored.dtype, self.folder.read)

    def _named_parts(self, native: NativeModel) -> Parts:
        """Returns the parts by the names that the folder has."""
        older, have = self.family.older_parts, self.folder.tensors
        if older is not None and next(part.name for part in older(native)) in have:
            return older(native)
        return self.family.parts(native)

    def _located(self, parts: Parts, tied: bool) -> list[Part | Constant]:
        """Returns the parts by the names that they have in the folder, after checking that it has all of them and no others.

        Raises:
            CheckpointError: a tensor is missing, of another shape or kind, or does not belong to the model.
        """
        have, where = self.folder.tensors, self.folder.directory
        located: list[Part | Constant] = []
        for part in parts:
            # Older files of a bare model leave out the first word.
            names = [name for name in (part.name, part.name.partition(".")[2]) if name in have]
            if not names:
                raise CheckpointError(
                    f"{where} has no tensor {part.name}, which a {self.family.name} model of its {CONFIG} needs."
                    + nearest(part.name, have)
                )
            name, stored = names[0], have[names[0]]
            located.append(replace(part, name=name))
            if stored.shape not in (part.shape, getattr(part, "older_shape", part.shape) or part.shape):
                raise CheckpointError(f"{where}: {name} is {list(stored.shape)}; its {CONFIG} says {list(part.shape)}.")
            if not stored.dtype.is_floating_point:
                raise CheckpointError(
                    f"{where}: {name} holds {stored.dtype_name} values, which are not weights (quantized weights are not read)."
                )
            if isinstance(part, Constant) and not bool((self.folder.read(name) == part.value).all()):
                raise CheckpointError(f"{where}: {name} is not {part.value:g} everywhere, and {part.why}.")
        if tied:
            self._refuse_another_head(parts_of(located)["embedding.word.weight"][0].name)
        known = {part.name for part in located}
        unused = _HEADS if tied else ()
        others = [n for n in have if n not in known and not n.endswith(self.family.ignored) and n not in unused]
        if others:
            raise CheckpointError(
                f"{where} holds {len(others)} tensors that a {self.family.name} model of its {CONFIG} has no place for: "
                f"{', '.join(others[:3])}{' and others' if others[3:] else ''}."
            )
        return located

    def _refuse_another_head(self, embedding: str) -> None:
        """Raises CheckpointError where files of a tied model hold an output matrix that is not its embedding."""
        for head in _HEADS:
            if head in self.folder.tensors:
                own, words = self.folder.read(head), self.folder.read(embedding)
                if own.shape != words.shape or not torch.equal(own.float(), words.float()):
                    raise CheckpointError(
                        f"{self.folder.directory}: {head} differs from {embedding}, though its {CONFIG} ties the two "
                        "(tie_word_embeddings is true). Set it to false if the head is meant, or remove the tensor."
                    )

    def _expert_fractions(self, remembered: Remembered | None) -> Tensor | None:
        """Returns the experts' loads that training continues from; uniform where they are unknown."""
        experts = [place.num_experts for place in moe_layers(self.native.config)]
        if not experts:
            return None
        if remembered is not None and remembered.expert_fractions is not None:
            fractions_LE = torch.tensor(remembered.expert_fractions, dtype=torch.float32)
            if tuple(fractions_LE.shape) == (len(experts), max(experts)):
                return fractions_LE
        return uniform_fractions(experts)

    def _train_state(self, remembered: Remembered | None) -> dict[str, Any]:
        if remembered is not None:
            return dict(remembered.train_state)
        loss_scale = asdict(LossScale.of(self.native.config.training))
        begun = {"iteration": 0, "consumed_samples": 0, "consumed_tokens": 0}
        return {**begun, "loss_scale": loss_scale, "vocab_size": self.native.vocab_size}


def _refuse_adapter(directory: Path) -> None:
    """Raises ConfigError where transformers would add an adapter to a folder's weights."""
    if (directory / ADAPTER).exists():
        raise ConfigError(
            str(directory / ADAPTER),
            "an adapter",
            "transformers with peft adds it to the weights when it loads the folder. Merge it first (peft: merge_and_unload, then "
            "save_pretrained into another folder), or remove the file to import the weights without it",
        )


def family_of(config: Mapping[str, Any]) -> Family:
    """Returns the family that config.json names; ConfigError where it is unknown."""
    kind = config.get("model_type")
    known = {family.name: family for family in families()}
    if not isinstance(kind, str) or kind not in known:
        raise ConfigError(
            f"{CONFIG}: model_type",
            kind,
            f"is not a family that can be imported; these can: {', '.join(known)}." + nearest(str(kind), known),
        )
    return known[kind]


def derived_model(family: Family, config: Mapping[str, Any]) -> NativeModel:
    """Returns the native model that a config.json describes; ConfigError where ours cannot compute it."""
    entries = completed(family.entries, config, family.name)
    vocab_size = entries.get("vocab_size")
    if type(vocab_size) is not int or not 0 < vocab_size < 2**31:
        raise ConfigError(f"{CONFIG}: vocab_size", vocab_size, "must be a positive integer")
    options = family.read_config(entries)
    # Whoever trains on gives data of his own; a configuration must name some.
    base = replace(PretrainConfig(), data=DataConfig(mock_data=True, vocab_size=vocab_size))
    return _legal(NativeModel(apply_mapping(base, options, CONFIG), vocab_size))


def _legal(native: NativeModel) -> NativeModel:
    """Returns a model that is legal, before anything has its sizes; ConfigErrors where it is not, or cannot be exported."""
    validate_model(native.config)
    refuse_unknown(native.config, "export", "Hugging Face's classes")
    return native
