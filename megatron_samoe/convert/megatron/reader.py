"""Reads Megatron-LM's checkpoint format `torch` as global tensors, whatever layout wrote it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.config.cli import to_mapping
from megatron_samoe.convert.edited_model import validate_model
from megatron_samoe.convert.hf.parts import VOCABULARY
from megatron_samoe.convert.layer_experts import layer_of
from megatron_samoe.convert.megatron.arguments import from_arguments
from megatron_samoe.convert.megatron.names import MegatronLayout, MegatronStyle, Slice, slices_of
from megatron_samoe.convert.megatron.rank_files import (
    RankPlace,
    find_iteration,
    folder_name,
    load_rank_file,
    place_of,
    rank_folders,
)
from megatron_samoe.convert.native import NativeModel, lossless_precision
from megatron_samoe.dist_checkpointing.global_tensors import StoredTensor
from megatron_samoe.dist_checkpointing.plausible import refuse_other_sizes
from megatron_samoe.dist_checkpointing.saved_tensor import is_plain
from megatron_samoe.errors import CheckpointError, ConfigError, is_odd_name, naming_file, shown, some
from megatron_samoe.optimizer.mixed_precision import LossScale

_LOCAL_LAYER = re.compile(r"decoder\.layers\.(\d{1,7})\.")
#: Arguments in which all ranks' files agree.
_SAME = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "num_layers",
    "hidden_size",
)


@dataclass(frozen=True)
class _Entry:
    """One tensor of a file: whose file, under which of its models (chunks), and its name there."""

    folder: Path
    model: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


#: (tensor-parallel rank, expert-parallel rank) and Megatron's name with the layer's number in the whole model.
_Index = dict[tuple[int, int], dict[str, _Entry]]


class MegatronReader:
    """A checkpoint of Megatron-LM's format `torch`.

    Args:
        directory: the folder with latest_checkpointed_iteration.txt, or one iteration's.
        vocab_size: tokens that exist; what the checkpoint says, or the padded size, if not given.

    Attributes:
        notes: lines that a user should know.

    Raises:
        CheckpointError: it is none, is damaged or incomplete, or of a model that this program cannot compute.
        ConfigError: `vocab_size` does not fit.
    """

    def __init__(self, directory: Path, ckpt_step: int | None = None, vocab_size: int | None = None):
        self.directory = find_iteration(Path(directory), ckpt_step)
        folders = rank_folders(self.directory)
        first = load_rank_file(folders[0])
        args = first["args"]
        self.arguments: Mapping[str, Any] = vars(args)
        where = f"{folders[0]}'s arguments"
        with naming_file(where):
            config = from_arguments(args, str(folders[0]))
        layout = _layout_of(args, folders[0])
        self._index = _read_index(folders, first, layout)
        self._layout = replace(layout, style=_style_of(self._index))
        sizes = {"num_layers": config.model.num_layers, "hidden_size": config.model.hidden_size}
        shapes = {key: entry.shape for entries in self._index.values() for key, entry in entries.items()}
        refuse_other_sizes(sizes, shapes, str(self.directory), "decoder.layers.")
        padded = _count(args, "padded_vocab_size", 0, folders[0])
        # Other tools' checkpoints may be padded to something else than they say.
        divisor = math.gcd(padded, config.model.make_vocab_size_divisible_by)
        config = replace(config, model=replace(config.model, make_vocab_size_divisible_by=divisor))
        vocab = vocab_size or _count(args, "vocab_size", padded, folders[0])
        if not 0 < vocab <= padded:
            raise ConfigError("--vocab-size", vocab, f"must be from 1 to the {padded} rows of {self.directory}")
        with naming_file(where):
            validate_model(config)
        if config.moe.most_experts % layout.expert_parallel and config.moe.expert_layout != "dense":
            raise CheckpointError(
                f"{folders[0]}: its arguments say {config.moe.most_experts} experts on {layout.expert_parallel} expert-parallel "
                "ranks, which have equal numbers in Megatron."
            )
        self._native = NativeModel(config, vocab)
        self._padded = padded
        iteration = _count(first, "iteration", 0, folders[0], least=0)
        samples = _count(args, "consumed_train_samples", 0, folders[0], least=0)
        self.train_state: Mapping[str, Any] = {
            "iteration": iteration,
            "consumed_samples": samples,
            "consumed_tokens": samples * config.model.seq_length,
            "loss_scale": asdict(LossScale()),
            "vocab_size": vocab,
        }
        self._open = _OpenFiles()
        self._parts = {name: self._find(name, stored) for name, stored in self._native.tensors.items()}
        self._refuse_rest()
        stored = [(name, e.key, e.dtype) for name, found in self._parts.items() for _, e in found]
        config, self.notes = lossless_precision(self._native, stored, str(self.directory))
        self.config: Mapping[str, Any] = to_mapping(config)
        self.attachments: Mapping[str, bytes] = {}
        self.tensors: Mapping[str, StoredTensor] = NativeModel(config, vocab).tensors

    def read(self, name: str) -> Tensor:
        """Returns a tensor, put together from all ranks' files."""
        stored = self.tensors[name]
        whole = torch.empty(self._file_shape(name, stored.shape), dtype=stored.dtype)
        for part, entry in sorted(self._parts[name], key=lambda pair: pair[1].folder):
            part.put(whole, self._open.content_of(entry.folder)[entry.model][entry.key])
            self._open.count(math.prod(entry.shape) * entry.dtype.itemsize)
        return whole[: stored.shape[0]].clone() if name in VOCABULARY else whole

    def _file_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The whole tensor's shape in the files: Megatron's vocabulary may be padded further."""
        return (self._padded, *shape[1:]) if name in VOCABULARY else shape

    def _find(self, name: str, stored: StoredTensor) -> list[tuple[Slice, _Entry]]:
        """Returns a tensor's slices, each with the first entry that has it.

        Raises:
            CheckpointError: one is missing or of another shape.
        """
        layer = layer_of(name)
        is_moe = layer is not None and self._native.is_moe[layer]
        found = []
        for part in slices_of(name, self._file_shape(name, stored.shape), layer, is_moe, self._layout):
            ranks = (entries for rank, entries in self._index.items() if part.is_on(*rank))
            entry = next((entries[part.name] for entries in ranks if part.name in entries), None)
            if entry is None:
                raise CheckpointError(
                    f"{self.directory} has no tensor {part.name} of tensor rank {part.tp or 0}, for {name}."
                )
            if entry.shape != part.shape:
                raise CheckpointError(
                    f"{entry.folder}: {entry.key} is {list(entry.shape)}; its arguments say {list(part.shape)}."
                )
            found.append((part, entry))
        return found

    def _refuse_rest(self) -> None:
        used = {(e.folder, e.model, e.key) for found in self._parts.values() for _, e in found}
        # Megatron's router has a bias wherever linear layers have one; ours never does.
        biases = [
            e for entries in self._index.values() for key, e in entries.items() if key.endswith("mlp.router.bias")
        ]
        if any(load_rank_file(e.folder)[e.model][e.key].any() for e in biases):
            raise CheckpointError(f"{self.directory} has routers with a bias, which this program's model lacks.")
        used |= {(e.folder, e.model, e.key) for e in biases}
        known = {re.sub(r"\d+", "#", key) for _, _, key in used} | {"output_layer.weight"}
        rest = sorted(
            {key for entries in self._index.values() for key in entries if re.sub(r"\d+", "#", key) not in known}
        )
        if rest:
            raise CheckpointError(f"{self.directory} has tensors that this program's model lacks: {some(rest)}.")


class _OpenFiles:
    """Ranks' files, mapped, until so much of them has been read that their pages would fill memory."""

    MAX_BYTES = 128 << 20

    def __init__(self) -> None:
        self._contents: dict[Path, Mapping[str, Any]] = {}
        self._read_bytes = 0

    def content_of(self, folder: Path) -> Mapping[str, Any]:
        """Returns a rank's file."""
        if self._read_bytes > self.MAX_BYTES:
            self._contents, self._read_bytes = {}, 0
        if folder not in self._contents:
            self._contents[folder] = load_rank_file(folder)
        return self._contents[folder]

    def count(self, num_bytes: int) -> None:
        """Notes that so much has been read."""
        self._read_bytes += num_bytes


def _equal(a: object, b: object) -> bool:
    return type(a) is type(b) and not isinstance(a, Tensor) and a == b


def _count(holder: Any, name: str, default: int, where: object, least: int = 1) -> int:
    """Returns a whole number that a file keeps under a name; CheckpointError where it keeps something else."""
    value = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
    value = default if value is None else value
    if type(value) is not int or not least <= value < 2**62:
        raise CheckpointError(f"{where}: {name} is {shown(value)}, which is no number of such things.")
    return value


def _layout_of(args: Any, where: Path) -> MegatronLayout:
    """Returns the sizes that a file's arguments say."""
    pp, told = _count(args, "pipeline_model_parallel_size", 1, where), "The checkpoint's arguments"
    tp = _count(args, "tensor_model_parallel_size", 1, told)
    etp = _count(args, "expert_tensor_parallel_size", tp, told)
    ep = _count(args, "expert_model_parallel_size", 1, told)
    if etp not in (1, tp):
        raise CheckpointError(
            f"expert_tensor_parallel_size is {etp}: only 1 and the tensor-parallel size {tp} are read."
        )
    return MegatronLayout(tp, pp, ep, etp)


def _read_index(folders: list[Path], first: Mapping[str, Any], layout: MegatronLayout) -> _Index:
    """Returns what all files hold, with layers numbered over all stages and chunks.

    Args:
        first: the content of one of the files.

    Raises:
        CheckpointError: a rank's file is missing, or is of another layout or iteration.
    """
    tp, pp, ep = layout.tensor_parallel, layout.pipeline_parallel, layout.expert_parallel
    where, sizes = folders[0].parent, f"its arguments say tensor {tp}, pipeline {pp} and expert parallel {ep}"
    if max(pp, tp, ep) > 64 * len(folders):  # before there is a set of that size
        raise CheckpointError(f"{where} is incomplete: it has {len(folders)} ranks' files; {sizes}.")
    by_place = {place_of(folder, pp > 1): folder for folder in folders}
    # With whole experts on each tensor-parallel rank not every pair of ranks exists.
    missing = sorted(folder_name(place, pp, ep) for place in set(layout.ranks()) - set(by_place))
    if missing:
        raise CheckpointError(f"{where} is incomplete: {some(missing)} missing ({sizes}).")
    known = {RankPlace(t, p, e) for t in range(tp) for p in range(pp) for e in range(ep)}
    known_names = {folder_name(place, pp, ep) for place in known}
    strange = sorted(folder.name for folder in folders if folder.name not in known_names)
    if strange:
        raise CheckpointError(f"{where} has files of other ranks than it should: {some(strange)} ({sizes}).")
    index: _Index = {}
    contents = {place: list(_tensors(folder, first)) for place, folder in by_place.items()}
    for t, e in sorted({(place.tp, place.ep) for place in by_place}):
        index[t, e] = {}
        stages = {place.pp: entries for place, entries in contents.items() if (place.tp, place.ep) == (t, e)}
        for key, entry in _renumbered(stages):
            index[t, e].setdefault(key, entry)
    return index


def _tensors(folder: Path, first: Mapping[str, Any]) -> Iterator[_Entry]:
    content = load_rank_file(folder)
    own, firsts = ({**vars(c["args"]), "iteration": c.get("iteration")} for c in (content, first))
    for name in ("iteration", *_SAME):
        if not _equal(own.get(name), firsts.get(name)):
            raise CheckpointError(
                f"{folder.parent} is mixed: {name} is {shown(own.get(name))} in {folder.name} and "
                f"{shown(firsts.get(name))} in another."
            )
    models = [name for name in content if re.fullmatch(r"model\d*", name) and isinstance(content[name], dict)]
    if not models:
        raise CheckpointError(f"{folder} holds no model.")
    for model in sorted(models, key=lambda name: int(name[5:] or 0)):
        for key, value in content[model].items():
            if is_odd_name(key):
                raise CheckpointError(f"{folder}: {model} has an entry called {shown(key)}.")
            if isinstance(value, Tensor) and not key.endswith("_extra_state"):
                if not is_plain(value):
                    raise CheckpointError(f"{folder}: {key} is no dense tensor with its elements in the file.")
                yield _Entry(folder, model, key, tuple(value.shape), value.dtype)


def _renumbered(stages: dict[int, list[_Entry]]) -> Iterator[tuple[str, _Entry]]:
    """Yields entries under names with the layer's number in the whole model: chunk by chunk, stage by stage."""
    offset = 0
    for model in sorted({e.model for entries in stages.values() for e in entries}, key=lambda name: int(name[5:] or 0)):
        for stage in sorted(stages):
            entries, count = [e for e in stages[stage] if e.model == model], 0
            for entry in entries:
                match = _LOCAL_LAYER.match(entry.key)
                if match is None:
                    yield entry.key, entry
                    continue
                count = max(count, int(match[1]) + 1)
                yield f"decoder.layers.{int(match[1]) + offset}." + entry.key[match.end() :], entry
            offset += count


def _style_of(index: _Index) -> MegatronStyle:
    keys = {key for entries in index.values() for key in entries}
    fused = any(key.endswith("linear_qkv.layer_norm_weight") for key in keys)
    legacy = any(key.endswith("mlp.experts.weight1") for key in keys)
    sequential = any(".local_experts." in key for key in keys)
    return MegatronStyle(
        "transformer_engine" if fused else "local",
        "legacy_grouped" if legacy else "sequential" if sequential else "grouped",
    )
