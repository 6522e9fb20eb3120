"""Writes a model as Megatron-LM's checkpoint format `torch`: one file per model-parallel rank.

The files of a pipeline stage are open together, so each of our tensors is read once and then cut for all of them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.config.cli import from_mapping
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.validate import refuse_unknown
from megatron_samoe.convert.edited_model import model_names
from megatron_samoe.convert.fold import fold_shared
from megatron_samoe.convert.hf.parts import VOCABULARY, Constant
from megatron_samoe.convert.layer_experts import layer_of
from megatron_samoe.convert.megatron.arguments import to_arguments
from megatron_samoe.convert.megatron.names import MegatronLayout, Slice, slices_of
from megatron_samoe.convert.megatron.rank_files import CHECKPOINT_VERSION, FILE_NAME, RankPlace, folder_name
from megatron_samoe.convert.megatron.torch_file import PromisedTensor, TorchFile
from megatron_samoe.convert.output_folder import new_folder, require_space
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors, StoredTensor
from megatron_samoe.dist_checkpointing.store import LATEST, refuse_parts
from megatron_samoe.errors import ConfigError
from megatron_samoe.models.layer_layout import all_layers, rank_plans
from megatron_samoe.tensor_parallel.layers import padded_vocab_size


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a rank's file.

    Attributes:
        chunk: index of the rank's model chunk.
        part: of ours, or zeros that Megatron has and we lack.
    """

    chunk: int
    part: Slice | Constant
    dtype: torch.dtype

    @property
    def stored(self) -> StoredTensor:
        """One tensor of a file."""
        return StoredTensor(self.part.shape, self.dtype)


@dataclass(frozen=True)
class ExportPlan:
    """The plan of an export.

    Attributes:
        source: the model, folded if its layers share experts.
        files: by rank, the tensors of its file.
        padded_vocab_size: rows of the word embedding; Megatron's rounding depends on the layout.
    """

    source: GlobalTensors
    layout: MegatronLayout
    arguments: Mapping[str, Any]
    files: Mapping[RankPlace, list[PlannedTensor]]
    padded_vocab_size: int
    notes: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Size of all files' tensors."""
        return sum(tensor.stored.num_bytes for tensors in self.files.values() for tensor in tensors)


def plan_export(source: GlobalTensors, layout: MegatronLayout) -> ExportPlan:
    """Returns what an export would write; nothing is read yet.

    Raises:
        ConfigError: Megatron has no such model, or the layout does not divide it.
    """
    source, config, notes = folded_for_megatron(source)
    vocab_size = int(source.train_state["vocab_size"])
    layout = layout.for_model(config)
    check_layout(config, layout)
    divisor = config.model.make_vocab_size_divisible_by * layout.tensor_parallel
    padded = padded_vocab_size(vocab_size, divisor)
    arguments = vars(to_arguments(config, vocab_size, padded)) | layout_arguments(source, config, layout)
    files = _planned(source, config, layout, padded)
    return ExportPlan(source, layout, arguments, files, padded, notes + notes_of(config, vocab_size, padded))


def folded_for_megatron(source: GlobalTensors) -> tuple[GlobalTensors, PretrainConfig, tuple[str, ...]]:
    """Returns a model as Megatron can have it, its configuration, and lines on what changes.

    Raises:
        ConfigError: Megatron has no such model.
    """
    notes: tuple[str, ...] = ()
    config = from_mapping(source.config, "the checkpoint's config.yaml")
    if config.moe.shares_experts:
        source = fold_shared(source)
        config = from_mapping(source.config, "the folded model")
        notes = ("Megatron's layers share no experts: the model is folded into a plain MoE.",)
    refuse_unknown(config, "megatron", "Megatron's checkpoints")
    refuse_parts(source.train_state, "The checkpoint")
    return source, config, notes


def notes_of(config: PretrainConfig, vocab_size: int, padded: int) -> tuple[str, ...]:
    """Returns lines on what Megatron computes otherwise."""
    notes: tuple[str, ...] = ()
    if not config.model.swiglu:
        notes += ("GELU here is its tanh form, which Megatron computes with --bias-gelu-fusion only.",)
    if padded > vocab_size:
        notes += (f"Megatron's softmax counts the {padded - vocab_size} rows of padding; here they take no part.",)
    return notes


def check_layout(config: PretrainConfig, layout: MegatronLayout) -> None:
    """Raises ConfigError where a layout does not divide the model."""
    tp, pp, ep = layout.tensor_parallel, layout.pipeline_parallel, layout.expert_parallel
    model, moe = config.model, config.moe
    for name, size in (("tensor", tp), ("pipeline", pp), ("expert", ep)):
        if size < 1:
            raise ConfigError(f"--target-{name}-parallel-size", size, "must be a positive integer")
    has_bias = moe.expert_layout != "dense" and not model.disable_bias_linear
    if layout.etp not in (1, tp) or (has_bias and layout.etp > 1):
        allowed = (
            "1: Megatron does not split experts with biases" if has_bias else f"1 or {tp}, the tensor-parallel size"
        )
        raise ConfigError("--target-expert-tensor-parallel-size", layout.etp, f"must be {allowed}")
    sizes = {
        "--num-query-groups" if model.group_query_attention else "--num-attention-heads": model.num_kv_heads,
        "--ffn-hidden-size": model.mlp_size,
    }
    if moe.expert_layout != "dense":
        if layout.etp > 1:
            sizes["--moe-ffn-hidden-size"] = config.expert_ffn_size
        if moe.moe_shared_expert_intermediate_size is not None:
            sizes["--moe-shared-expert-intermediate-size"] = moe.moe_shared_expert_intermediate_size
    for name, value in sizes.items():
        if value % tp:
            raise ConfigError("--target-tensor-parallel-size", tp, f"must divide {name} {value}")
    if model.num_layers % pp:
        raise ConfigError("--target-pipeline-parallel-size", pp, f"must divide --num-layers {model.num_layers}")
    vpp, per_stage = layout.virtual_pipeline, model.num_layers // pp
    if vpp < 1 or per_stage % vpp or (vpp > 1 and pp == 1):
        raise ConfigError(
            "--target-virtual-pipeline-parallel-size",
            vpp,
            f"must divide the {per_stage} layers of each of {pp} pipeline ranks, and be 1 for one rank",
        )
    if moe.expert_layout == "dense" and ep > 1:
        raise ConfigError("--target-expert-parallel-size", ep, "must be 1 for a dense model")
    if moe.expert_layout != "dense" and moe.most_experts % ep:
        raise ConfigError("--target-expert-parallel-size", ep, f"must divide --num-experts {moe.num_experts}")
    if model.multi_latent_attention and layout.style.transformer_impl == "local" and tp > 1:
        raise ConfigError(
            "--target-tensor-parallel-size", tp, "must be 1 with latent attention and --transformer-impl local"
        )
    if layout.style.experts == "legacy_grouped" and has_bias:
        raise ConfigError("experts", "legacy_grouped", "needs --disable-bias-linear: Megatron's GroupedMLP has no bias")


def layout_arguments(source: GlobalTensors, config: PretrainConfig, layout: MegatronLayout) -> dict[str, Any]:
    """Returns the arguments of a layout and of a run's progress."""
    tp, ep, state = layout.tensor_parallel, layout.expert_parallel, source.train_state
    vpp, per_stage = layout.virtual_pipeline, config.model.num_layers // layout.pipeline_parallel
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": layout.pipeline_parallel,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": layout.etp,
        "context_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": vpp if vpp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": per_stage // vpp if vpp > 1 else None,
        "sequence_parallel": tp > 1 and config.moe.expert_layout != "dense",
        "transformer_impl": layout.style.transformer_impl,
        "use_mcore_models": True,
        "ckpt_format": "torch",
        "moe_grouped_gemm": config.moe.expert_layout != "dense" and layout.style.experts != "sequential",
        "moe_use_legacy_grouped_gemm": layout.style.experts == "legacy_grouped",
        "iteration": int(state.get("iteration", 0)),
        "consumed_train_samples": int(state.get("consumed_samples", 0)),
        "consumed_valid_samples": 0,
    }


def _planned(
    source: GlobalTensors, config: PretrainConfig, layout: MegatronLayout, padded: int
) -> dict[RankPlace, list[PlannedTensor]]:
    """Returns the tensors of each rank's file."""
    pp, vpp = layout.pipeline_parallel, layout.virtual_pipeline
    stages = replace(
        ParallelConfig(),
        pipeline_model_parallel_size=pp,
        num_layers_per_virtual_pipeline_stage=config.model.num_layers // pp // vpp,
    )
    first, last = (0, 0, None), (pp - 1, vpp - 1, None)
    #: Of each layer the pipeline rank, the chunk and its number there.
    homes: dict[int | None, tuple[int, int, int | None]] = {
        layer.index: (stage, chunk, number)
        for stage in range(pp)
        for chunk, plan in enumerate(rank_plans(replace(config, parallel=stages), stage))
        for number, layer in enumerate(plan.layers)
    }
    is_moe = {layer.index: layer.moe_index is not None for layer in all_layers(config)}
    files: dict[RankPlace, list[PlannedTensor]] = {place: [] for place in layout.ranks()}

    def add(parts: Sequence[Slice | Constant], stage: int, chunk: int, dtype: torch.dtype) -> None:
        for place, tensors in files.items():
            if place.pp == stage:
                here = [part for part in parts if isinstance(part, Constant) or part.is_on(place.tp, place.ep)]
                tensors += [PlannedTensor(chunk, part, dtype) for part in here]

    for name in model_names(source):
        stored, layer = source.tensors[name], layer_of(name)
        shape = (padded, *stored.shape[1:]) if name in VOCABULARY else stored.shape
        stage, chunk, number = homes.get(layer, first if name.startswith("embedding.") else last)
        parts = slices_of(name, shape, number, is_moe.get(layer or 0, False), layout, config.model)
        add(parts, stage, chunk, stored.dtype)
        if name.endswith(".moe.router.weight") and not config.model.disable_bias_linear:
            key = parts[0].name.replace("weight", "bias")
            add([Constant(key, (config.moe.most_experts,), 0.0, "")], stage, chunk, stored.dtype)
        if name == VOCABULARY[0] and not config.model.untie_embeddings_and_output_weights and pp > 1:
            tied = slices_of(VOCABULARY[1], shape, None, False, layout, config.model)
            add([replace(part, native=name) for part in tied], *last[:2], stored.dtype)
    return files


def write_export(
    plan: ExportPlan, root: Path, iteration: int | None, progress: Callable[[int], None] = lambda num_bytes: None
) -> Path:
    """Writes a planned export and returns the folder of its iteration.

    Args:
        iteration: None to write it as Megatron's `release`.
        progress: called with the bytes of each tensor as it is taken up.

    Raises:
        CheckpointError: the iteration is there already, the disk is too small, or it cannot be written.
    """
    name = "release" if iteration is None else f"iter_{iteration:07d}"
    require_space(root, plan.num_bytes)
    with new_folder(root / name) as folder:
        for stage in range(plan.layout.pipeline_parallel):
            places = [place for place in plan.files if place.pp == stage]
            _write_stage(plan, folder, places, iteration or 0, progress)
    track(root, iteration)
    return root / name


def track(root: Path, iteration: int | None) -> None:
    """Names the iteration in Megatron's tracker file."""
    tracker = root / f".{LATEST}.tmp"
    tracker.write_text("release" if iteration is None else str(iteration))
    os.replace(tracker, root / LATEST)


def _write_stage(
    plan: ExportPlan, folder: Path, places: Sequence[RankPlace], iteration: int, progress: Callable[[int], None]
) -> None:
    """Writes the files of ranks whose layers are the same."""
    with ExitStack() as stack:
        wanted: dict[str, list[tuple[TorchFile, PromisedTensor, PlannedTensor]]] = {}
        files = []
        for place in places:
            own = folder / folder_name(place, plan.layout.pipeline_parallel, plan.layout.expert_parallel)
            own.mkdir()
            promised = [PromisedTensor(tensor.part.shape, tensor.dtype) for tensor in plan.files[place]]
            file = TorchFile(own / FILE_NAME, _content(plan, place, promised, iteration), promised)
            stack.callback(file.abandon)
            files.append(file)
            for promise, tensor in zip(promised, plan.files[place], strict=True):
                native = "" if isinstance(tensor.part, Constant) else tensor.part.native
                wanted.setdefault(native, []).append((file, promise, tensor))
        for native, wishes in wanted.items():
            whole = with_rows(plan.source.read(native), native, plan.padded_vocab_size) if native else torch.empty(0)
            for file, promise, tensor in wishes:
                part = tensor.part
                made = part.take(whole) if isinstance(part, Slice) else torch.zeros(part.shape, dtype=tensor.dtype)
                file.write(promise, made)
                progress(tensor.stored.num_bytes)
            del whole  # not two whole tensors at a time
        for file in files:
            file.close()


def _content(plan: ExportPlan, place: RankPlace, promised: list[PromisedTensor], iteration: int) -> dict[str, Any]:
    """Returns what a rank's file holds, its tensors promised."""
    num_chunks = plan.layout.virtual_pipeline
    models: list[dict[str, Any]] = [{} for _ in range(num_chunks)]
    for promise, tensor in zip(promised, plan.files[place], strict=True):
        key, model = tensor.part.name, models[tensor.chunk]
        model[key] = promise
        if key.endswith("weight") and _has_extra_state(key):
            model[key.removesuffix("weight") + "_extra_state"] = None
    names = ["model"] if num_chunks == 1 else [f"model{chunk}" for chunk in range(num_chunks)]
    return {
        "args": argparse.Namespace(**plan.arguments),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": iteration,
        **dict(zip(names, models, strict=True)),
    }


def _has_extra_state(key: str) -> bool:
    """Whether Megatron's module has an extra state (None without FP8)."""
    return ".linear_" in key or key == "output_layer.weight"


def with_rows(tensor: Tensor, name: str, num_rows: int) -> Tensor:
    """Returns a vocabulary's tensor with zero rows appended up to Megatron's rounding."""
    if name not in VOCABULARY or tensor.shape[0] >= num_rows:
        return tensor
    return torch.cat((tensor, tensor.new_zeros(num_rows - tensor.shape[0], *tensor.shape[1:])))
