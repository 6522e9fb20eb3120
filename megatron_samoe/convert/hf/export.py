"""Export: a plan of what will be written, then the writing of it, tensor by tensor."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.convert.edited_model import FRACTIONS, NOT_MODEL, source_config
from megatron_samoe.convert.fold import fold_shared
from megatron_samoe.convert.hf.export_plan import ExportPlan
from megatron_samoe.convert.hf.families.samoe import CODE_FILES
from megatron_samoe.convert.hf.folder import CONFIG, GENERATION_CONFIG, INDEX, WEIGHTS
from megatron_samoe.convert.hf.model_card import model_card
from megatron_samoe.convert.hf.parts import Constant, parts_of
from megatron_samoe.convert.hf.safetensors_io import SafetensorsWriter
from megatron_samoe.convert.hf.sidecar import SIDECAR, Remembered, write_sidecar
from megatron_samoe.convert.hf.target import choose_target
from megatron_samoe.convert.hf.tokenizer_files import TokenizerFiles
from megatron_samoe.convert.native import NativeModel
from megatron_samoe.convert.output_folder import new_folder, require_space
from megatron_samoe.convert.read_ahead import Progress, ReadAhead
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors, StoredTensor, name_of
from megatron_samoe.dist_checkpointing.opened import Opened
from megatron_samoe.dist_checkpointing.store import refuse_parts
from megatron_samoe.errors import CheckpointError


def native_model(source: GlobalTensors) -> NativeModel:
    """Returns the description of a source; CheckpointError where it does not say its vocabulary."""
    refuse_parts(source.train_state, "The checkpoint")
    vocab_size = source.train_state.get("vocab_size")
    if type(vocab_size) is not int or vocab_size < 1:
        raise CheckpointError("The checkpoint's train_state.json has no vocab_size.")
    return NativeModel(source_config(source), vocab_size)


def refuse_other_tensors(source: Opened) -> None:
    """Raises CheckpointError where a folder's model is not the one of its configuration."""
    problems = differences(source.tensors)
    if problems:
        raise CheckpointError(f"{source.directory} is damaged: {problems[0]}{' (and more)' if problems[1:] else ''}.")


def differences(source: GlobalTensors) -> list[str]:
    """Returns a line for each tensor that is missing, has another shape, or does not belong to the configured model."""
    expected = native_model(source).tensors
    held = {name: stored for name, stored in source.tensors.items() if not name.startswith(NOT_MODEL)}
    return [
        *(f"{name} is missing" for name in expected if name not in held),
        *(f"{name} does not belong to the model of its config.yaml" for name in held if name not in expected),
        *(
            f"{name} is {list(held[name].shape)}, its config.yaml says {list(stored.shape)}"
            for name, stored in expected.items()
            if name in held and held[name].shape != stored.shape
        ),
    ]


def plan_export(
    source: GlobalTensors,
    wanted: str = "auto",
    *,
    fold: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    tokenizer: TokenizerFiles | None = None,
) -> ExportPlan:
    """Returns the plan of an export; nothing is read or written yet.

    Args:
        wanted, fold: see `choose_target`.
        dtype: of all tensors; each as it is stored if not given.
        max_shard_bytes: of one weight file, unless a single tensor is larger.

    Raises:
        ConfigError: the target cannot compute the model.
        CheckpointError: the checkpoint lacks tensors of its model.
    """
    target = choose_target(native_model(source), wanted, fold)
    if target.fold:
        source = fold_shared(source)
    native = native_model(source)
    missing = [name for name in native.tensors if name not in source.tensors]
    if missing:
        raise CheckpointError(
            f"The checkpoint has no {missing[0]}, which its config.yaml says ({len(missing)} missing)."
        )
    parts = list(target.family.parts(native))
    by_native = parts_of(parts)
    ordered = {name: by_native[name] for name in source.tensors if name in by_native}
    assert len(ordered) == len(native.tensors), f"without parts: {sorted(set(native.tensors) - set(ordered))}"
    constants = tuple(part for part in parts if isinstance(part, Constant))
    tensors = {
        part.name: StoredTensor(part.shape, dtype or source.tensors[name].dtype)
        for name, group in ordered.items()
        for part in group
    }
    constant_dtype = dtype or source.tensors["embedding.word.weight"].dtype
    tensors |= {c.name: StoredTensor(c.shape, constant_dtype) for c in constants}
    shards = _shards(tensors, max_shard_bytes)
    return ExportPlan(source, native, target, ordered, constants, tensors, shards, tokenizer)


def _shards(tensors: Mapping[str, StoredTensor], max_bytes: int) -> dict[str, dict[str, StoredTensor]]:
    groups: list[dict[str, StoredTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.num_bytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.num_bytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_export(plan: ExportPlan, directory: Path, progress: Progress = lambda _: None) -> Path:
    """Writes a planned export as a new folder, which appears when it is complete, and returns it.

    Args:
        progress: called with the bytes of each tensor that is written.

    Raises:
        CheckpointError: the folder exists, the disk is too small, or a tensor cannot be read.
    """
    require_space(directory, plan.num_bytes)
    with new_folder(directory) as folder:
        _write_weights(plan, folder, progress)
        _write_json(folder / CONFIG, _config(plan))
        generation = {"do_sample": False, "use_cache": True, **_token_ids(plan)}
        _write_json(folder / GENERATION_CONFIG, generation)  # the tokenizer may bring another one
        if plan.tokenizer is not None:
            plan.tokenizer.write(folder, plan.native.model.max_positions)
        if plan.target.family.name == "samoe":
            for name in CODE_FILES:
                shutil.copyfile(Path(__file__).parent / "remote_code" / name, folder / name)
        (folder / "README.md").write_text(model_card(plan))
        fractions = plan.source.read(FRACTIONS).tolist() if FRACTIONS in plan.source.tensors else None
        write_sidecar(folder / SIDECAR, Remembered(plan.source.config, plan.source.train_state, fractions))
    return directory


def _write_weights(plan: ExportPlan, folder: Path, progress: Progress) -> None:
    with ReadAhead(plan.source, list(plan.parts)) as source:
        written = _elements(plan, source)
        for file, contents in plan.shards.items():
            with SafetensorsWriter(folder / file, contents) as writer:
                for name, tensor in itertools.islice(written, len(contents)):
                    writer.add(name, tensor)
                    progress(plan.tensors[name].num_bytes)
    if len(plan.shards) > 1:
        weight_map = {name: file for file, contents in plan.shards.items() for name in contents}
        _write_json(folder / INDEX, {"metadata": {"total_size": plan.num_bytes}, "weight_map": weight_map})


def _elements(plan: ExportPlan, source: GlobalTensors) -> Iterator[tuple[str, Tensor]]:
    """Yields all tensors in the order of writing, with their elements in order; one native tensor is in memory at a time."""
    for native_name, parts in plan.parts.items():
        native = source.read(native_name)
        for part in parts:
            yield part.name, part.elements(native)
        del native
    for constant in plan.constants:
        yield constant.name, torch.full(constant.shape, constant.value, dtype=plan.tensors[constant.name].dtype)


def _token_ids(plan: ExportPlan) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return dict.fromkeys(names) if plan.tokenizer is None else plan.tokenizer.token_ids


def _config(plan: ExportPlan) -> dict[str, object]:
    """Returns the content of config.json."""
    family = plan.target.family
    dtype = name_of(plan.dtype)
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        **family.write_config(plan.native),
        # The first name is transformers 4's, the second transformers 5's.
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
        **_token_ids(plan),
    }


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
