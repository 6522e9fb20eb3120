"""Writes a model as Megatron-LM's checkpoint format `torch`: one file per model-parallel rank.

The files of a pipeline stage are open together, so each of our tensors is read once and then cut for all of them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
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
from megatron_samoe.convert.layer_experts import layer_of
from megatron_samoe.convert.megatron.arguments import to_arguments
from megatron_samoe.convert.megatron.names import MegatronStyle, Part, ep_rank_of, key_of, parts_of
from megatron_samoe.convert.megatron.rank_files import CHECKPOINT_VERSION, FILE_NAME, RankPlace, folder_name
from megatron_samoe.convert.megatron.torch_file import PromisedTensor, TorchFile
from megatron_samoe.convert.output_folder import new_folder, require_space
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors, StoredTensor
from megatron_samoe.dist_checkpointing.store import LATEST, refuse_parts
from megatron_samoe.errors import ConfigError
from megatron_samoe.models.layer_layout import all_layers, rank_plans
from megatron_samoe.tensor_parallel.layers import padded_vocab_size

VOCABULARY = ("embedding.word.weight", "output.weight")


@dataclass(frozen=True)
class MegatronLayout:
    """The ranks to write for, and the names they expect.

    Attributes:
        expert_tensor_parallel: ranks that split each expert, 1 or the tensor-parallel size; if None, the latter, but 1
            for experts with biases, which Megatron does not split.
        virtual_pipeline: chunks of layers of each pipeline rank.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: int = 1
    expert_tensor_parallel: int | None = None
    style: MegatronStyle = field(default_factory=MegatronStyle)
    virtual_pipeline: int = 1

    def for_model(self, config: PretrainConfig) -> MegatronLayout:
        """Returns the layout with nothing left to derive."""
        has_bias = config.moe.expert_layout != "dense" and not config.model.disable_bias_linear
        derived = 1 if has_bias else self.tensor_parallel
        given = self.expert_tensor_parallel
        return replace(self, expert_tensor_parallel=derived if given is None else given)

    @property
    def etp(self) -> int:
        """Ranks that split each expert."""
        return self.expert_tensor_parallel or self.tensor_parallel

    def ranks(self) -> list[RankPlace]:
        """Returns all ranks that have a file: Megatron counts tensor ranks fastest, and expert ranks past `etp`."""
        tp, ep = self.tensor_parallel, self.expert_parallel
        pairs = sorted({(rank % tp, rank // self.etp % ep) for rank in range(tp * ep)})
        return [RankPlace(t, p, e) for p in range(self.pipeline_parallel) for t, e in pairs]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a rank's file.

    Attributes:
        key: Megatron's name in the file.
        chunk: of the rank's chunks the one that has it.
        source: ours, or an empty name for zeros that Megatron has and we lack.
        split: ranks that share the part's split dim.
    """

    key: str
    chunk: int
    source: str
    part: Part
    shape: tuple[int, ...]
    dtype: torch.dtype
    split: int = 1

    @property
    def num_bytes(self) -> int:
        """Size of the elements."""
        return StoredTensor(self.shape, self.dtype).num_bytes


@dataclass(frozen=True)
class ExportPlan:
    """What will be written.

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
        return sum(tensor.num_bytes for tensors in self.files.values() for tensor in tensors)


def plan_export(source: GlobalTensors, layout: MegatronLayout) -> ExportPlan:
    """Returns what an export would write; nothing is read yet.

    Raises:
        ConfigError: Megatron has no such model, or the layout does not divide it.
    """
    notes: tuple[str, ...] = ()
    config = from_mapping(source.config, "the checkpoint's config.yaml")
    if config.moe.shares_experts:
        source = fold_shared(source)
        config = from_mapping(source.config, "the folded model")
        notes = ("Megatron's layers share no experts: the model is folded into a plain MoE.",)
    vocab_size = int(source.train_state["vocab_size"])
    refuse_unknown(config, "megatron", "Megatron's checkpoints")
    refuse_parts(source.train_state, "The checkpoint")
    layout = layout.for_model(config)
    check_layout(config, layout)
    divisor = config.model.make_vocab_size_divisible_by * layout.tensor_parallel
    padded = padded_vocab_size(vocab_size, divisor)
    arguments = vars(to_arguments(config, vocab_size, padded)) | _layout_arguments(source, config, layout)
    files = {place: _planned(source, config, layout, place, padded) for place in layout.ranks()}
    if not config.model.swiglu:
        notes += ("GELU here is its tanh form, which Megatron computes with --bias-gelu-fusion only.",)
    if padded > vocab_size:
        notes += (f"Megatron's softmax counts the {padded - vocab_size} rows of padding; here they take no part.",)
    return ExportPlan(source, layout, arguments, files, padded, notes)


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
    if layout.style.experts == "legacy_grouped" and has_bias:
        raise ConfigError("experts", "legacy_grouped", "needs --disable-bias-linear: Megatron's GroupedMLP has no bias")


def _layout_arguments(source: GlobalTensors, config: PretrainConfig, layout: MegatronLayout) -> dict[str, Any]:
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
    source: GlobalTensors, config: PretrainConfig, layout: MegatronLayout, place: RankPlace, padded: int
) -> list[PlannedTensor]:
    tp, pp, ep = layout.tensor_parallel, layout.pipeline_parallel, layout.expert_parallel
    stages = replace(
        ParallelConfig(),
        pipeline_model_parallel_size=pp,
        num_layers_per_virtual_pipeline_stage=config.model.num_layers // pp // layout.virtual_pipeline,
    )
    plans = rank_plans(replace(config, parallel=stages), place.pp)
    #: Chunk of each of the rank's layers, and the layer's number in the chunk.
    places: dict[int | None, tuple[int, int | None]] = {
        layer.index: (chunk, i) for chunk, plan in enumerate(plans) for i, layer in enumerate(plan.layers)
    }
    is_moe = {layer.index: layer.moe_index is not None for layer in all_layers(config)}
    experts_per_rank = max(config.moe.most_experts // ep, 1)
    tied = not config.model.untie_embeddings_and_output_weights
    planned = []
    for name in model_names(source):
        stored = source.tensors[name]
        shape = (padded, *stored.shape[1:]) if name in VOCABULARY else stored.shape
        layer = layer_of(name)
        outer = place.pp == 0 if name.startswith("embedding.") else place.pp == pp - 1
        is_here = layer in places if layer is not None else outer
        chunk, local_layer = places.get(layer, (0 if name.startswith("embedding.") else len(plans) - 1, None))
        for part in parts_of(name, shape, layout.style, is_moe.get(layer or 0, False), ep):
            holder = ep_rank_of(part, config.moe.most_experts, ep)
            if not is_here or holder not in (None, place.ep):
                continue
            key = key_of(part, local_layer, experts_per_rank)
            split = tp if part.experts is None else layout.etp
            own_shape = part.local_shape(shape, split)
            planned.append(PlannedTensor(key, chunk, name, part, own_shape, stored.dtype, split))
            if key.endswith(".mlp.router.weight") and not config.model.disable_bias_linear:
                bias = Part(key.replace("weight", "bias"))
                planned.append(PlannedTensor(bias.key, chunk, "", bias, (config.moe.most_experts,), stored.dtype))
        if name == VOCABULARY[0] and tied and pp > 1 and place.pp == pp - 1:
            part = Part("output_layer.weight", split_dim=0)
            own_shape = part.local_shape(shape, tp)
            planned.append(PlannedTensor(part.key, len(plans) - 1, name, part, own_shape, stored.dtype, tp))
    return planned


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
    tracker = root / f".{LATEST}.tmp"
    tracker.write_text("release" if iteration is None else str(iteration))
    os.replace(tracker, root / LATEST)
    return root / name


def _write_stage(
    plan: ExportPlan, folder: Path, places: Sequence[RankPlace], iteration: int, progress: Callable[[int], None]
) -> None:
    """Writes the files of ranks whose layers are the same."""
    with ExitStack() as stack:
        wanted: dict[str, list[tuple[TorchFile, PromisedTensor, PlannedTensor, RankPlace]]] = {}
        files = []
        for place in places:
            own = folder / folder_name(place, plan.layout.pipeline_parallel, plan.layout.expert_parallel)
            own.mkdir()
            promised = [PromisedTensor(tensor.shape, tensor.dtype) for tensor in plan.files[place]]
            file = TorchFile(own / FILE_NAME, _content(plan, place, promised, iteration), promised)
            stack.callback(file.abandon)
            files.append(file)
            for promise, tensor in zip(promised, plan.files[place], strict=True):
                wanted.setdefault(tensor.source, []).append((file, promise, tensor, place))
        for source, wishes in wanted.items():
            whole = _with_rows(plan.source.read(source), source, plan.padded_vocab_size) if source else None
            for file, promise, tensor, place in wishes:
                file.write(promise, _cut(whole, tensor, place))
                progress(tensor.num_bytes)
            del whole  # not two whole tensors at a time
        for file in files:
            file.close()


def _cut(whole: Tensor | None, tensor: PlannedTensor, place: RankPlace) -> Tensor:
    if whole is None:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    # Each expert is whole on one of the ranks, or split over all tensor-parallel ranks.
    return tensor.part.cut(whole, place.tp if tensor.split > 1 else 0, tensor.split)


def _content(plan: ExportPlan, place: RankPlace, promised: list[PromisedTensor], iteration: int) -> dict[str, Any]:
    """Returns what a rank's file holds, its tensors promised."""
    num_chunks = plan.layout.virtual_pipeline
    models: list[dict[str, Any]] = [{} for _ in range(num_chunks)]
    for promise, tensor in zip(promised, plan.files[place], strict=True):
        models[tensor.chunk][tensor.key] = promise
        if tensor.key.endswith("weight") and _has_extra_state(tensor.key):
            models[tensor.chunk][tensor.key.removesuffix("weight") + "_extra_state"] = None
    names = ["model"] if num_chunks == 1 else [f"model{chunk}" for chunk in range(num_chunks)]
    return {
        "args": argparse.Namespace(**plan.arguments),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": iteration,
        **dict(zip(names, models, strict=True)),
    }


def _has_extra_state(key: str) -> bool:
    """Whether Megatron's module has an entry of its own besides parameters (None where there is no fp8)."""
    return ".linear_" in key or key == "output_layer.weight"


def _with_rows(tensor: Tensor, name: str, num_rows: int) -> Tensor:
    """Returns a vocabulary's tensor with zero rows appended up to Megatron's rounding."""
    if name not in VOCABULARY or tensor.shape[0] >= num_rows:
        return tensor
    return torch.cat((tensor, tensor.new_zeros(num_rows - tensor.shape[0], *tensor.shape[1:])))
