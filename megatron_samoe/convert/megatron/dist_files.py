"""Megatron-LM's format `torch_dist`: global tensors by torch's distributed checkpoints, written in any layout.

iter_0001000/metadata.json           says that it is one
             .metadata, *.distcp     tensors, equal layers stacked, and experts of a layer stacked
             common.pt               arguments and iteration; newer versions keep them as an object among the tensors
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.convert.megatron.names import MegatronLayout
from megatron_samoe.convert.megatron.rank_files import CHECKPOINT_VERSION, DISTRIBUTED, load_plain
from megatron_samoe.convert.megatron.stored import Entry, Stored, canonical, count
from megatron_samoe.dist_checkpointing.global_tensors import DistributedTensors, StoredTensor
from megatron_samoe.errors import CheckpointError, in_units, shown
from megatron_samoe.models.rank_model import stored_name
from megatron_samoe.parsing import parse_json, read_text

COMMON, FORMAT = "common.pt", "torch_dist"
#: The common state as an object.
COMMON_OBJECT = "common_state/shard_0_1"
MAX_LAYERS = 100_000
_NOT_MODEL = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state_machine")
_LAYER = re.compile(r"decoder\.layers\.(?:(\d{1,6})\.)?(.+)")
#: What the plug-in's layers own, by their number among layers with experts.
_LENT = re.compile(r"mlp\.experts\.layer_(\d{1,6})\.(.+)")
_SINGLE_EXPERT = re.compile(r"mlp\.experts\.experts\.(\d+)\.")


def is_torch_dist(directory: Path) -> bool:
    """Returns whether a folder is one iteration of the format."""
    return (directory / DISTRIBUTED).is_file()


def open_torch_dist(directory: Path) -> Stored:
    """Returns what a checkpoint holds.

    Raises:
        CheckpointError: it is damaged, of another format, or keeps no arguments.
    """
    _require_format(directory)
    tensors = DistributedTensors(directory)
    where, common = _common(directory, tensors)
    args = common.get("args")
    if not isinstance(args, argparse.Namespace):
        raise CheckpointError(
            f"{where} keeps no arguments of Megatron-LM, without which the model is not known. A training program of your own "
            'saves them with the model: dist_checkpointing.save({"args": args, **model.sharded_state_dict()}, folder).'
        )
    version = common.get("checkpoint_version", CHECKPOINT_VERSION)
    if type(version) not in (int, float) or version != CHECKPOINT_VERSION:
        raise CheckpointError(f"{where} has checkpoint_version {shown(version)}; {CHECKPOINT_VERSION} is read.")
    model = {name: stored for name, stored in tensors.tensors.items() if not _NOT_MODEL.match(name)}
    entries = dict(_entries(directory, model))
    words = entries.get("embedding.word_embeddings.weight")
    if getattr(args, "padded_vocab_size", None) is None and words is not None:
        args.padded_vocab_size = words.shape[0]
    left_out = sum(stored.num_bytes for name, stored in tensors.tensors.items() if name not in model)
    notes = (f"Its optimizer state ({in_units(left_out, 'B')}) is left out.",) if left_out else ()

    def read(entry: Entry) -> Tensor:
        first = tensors.read(entry.key, entry.at)
        return torch.cat((first, tensors.read(entry.second, entry.at))) if entry.second else first

    iteration = count(common, "iteration", 0, where, least=0)
    return Stored(directory, where, args, iteration, MegatronLayout(1, 1, 1, 1), {(0, 0): entries}, read, notes)


def _require_format(directory: Path) -> None:
    path = directory / DISTRIBUTED
    try:
        said: Any = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())}.") from None
    backend = said.get("sharded_backend") if isinstance(said, dict) else None
    if backend != FORMAT:
        raise CheckpointError(f"{path} says sharded_backend {shown(backend)}; {FORMAT} is read.")


def _common(directory: Path, tensors: DistributedTensors) -> tuple[Path, Mapping[str, Any]]:
    """Returns the file of values that are not tensors, and these."""
    path = directory / COMMON
    if path.is_file():
        content = load_plain(path, path)
    else:
        path, held = directory / ".metadata", tensors.read_object(COMMON_OBJECT)
        content = {} if held is None else load_plain(io.BytesIO(held), path)
        content = content[0] if isinstance(content, list) and len(content) == 1 else content
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds {shown(content)} in place of a mapping.")
    return path, content


def _entries(directory: Path, model: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Entry]]:
    """Yields tensors under canonical names, with layers one by one."""
    for name, stored in model.items():
        if name.endswith(("weight_v", "bias_v", "mlp.router.steps")):
            continue  # the second half of the tensor whose name ends in _w; a count of the plug-in's
        second, shape, key = "", stored.shape, name
        if name.endswith(("weight_w", "bias_w")):
            second, key = f"{name[:-1]}v", name[:-2]
            if second not in model or model[second].shape != shape or model[second].dtype != stored.dtype:
                raise CheckpointError(f"{directory} has {name} without a {second} like it.")
        match = _LAYER.fullmatch(key)
        if match is None:
            lent = key.removeprefix("expert_pool.")
            yield stored_name(key) if lent != key else key, Entry(directory, "", name, shape, stored.dtype)
            continue
        layer, rest = match.groups()
        owned = _LENT.fullmatch(rest)
        if owned is not None:
            key = stored_name(f"layers.{layer or int(owned[1])}.moe.experts.{owned[2]}")
            yield key, Entry(directory, "", name, shape, stored.dtype)
            continue
        stacked = layer is None
        if stacked and (not shape or shape[0] > MAX_LAYERS):
            raise CheckpointError(f"{directory} is damaged: {name} of shape {list(shape)} is not a stack of layers.")
        rest = _SINGLE_EXPERT.sub(r"mlp.experts.local_experts.\1.", rest)
        for number in range(shape[0]) if stacked else (int(layer),):
            of_layer = shape[1:] if stacked else shape
            of_layer = (2 * of_layer[0], *of_layer[1:]) if second and of_layer else of_layer
            at = (number,) if stacked else ()
            yield (
                canonical(f"decoder.layers.{number}.{rest}"),
                Entry(directory, "", name, of_layer, stored.dtype, at, second),
            )
