"""Writes a model as Megatron-LM's format `torch_dist`, which loads in every layout."""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.config.model import ModelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.validate import refuse_unknown
from megatron_samoe.convert.edited_model import model_names, source_config
from megatron_samoe.convert.fold import fold_shared
from megatron_samoe.convert.hf.parts import VOCABULARY
from megatron_samoe.convert.layer_experts import layer_of
from megatron_samoe.convert.megatron.arguments import to_arguments
from megatron_samoe.convert.megatron.dist_files import COMMON, FORMAT
from megatron_samoe.convert.megatron.names import FUSED_NORMS, MegatronLayout, slices_of
from megatron_samoe.convert.megatron.rank_files import CHECKPOINT_VERSION, DISTRIBUTED
from megatron_samoe.convert.output_folder import new_folder, require_space
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors, StoredTensor
from megatron_samoe.dist_checkpointing.saving import write_sharded
from megatron_samoe.dist_checkpointing.sharded_state import UnreadTensor
from megatron_samoe.dist_checkpointing.store import LATEST, refuse_parts
from megatron_samoe.models.layer_layout import all_layers
from megatron_samoe.parallel_state.state import single_process_state
from megatron_samoe.tensor_parallel.layers import padded_vocab_size

#: Modules that keep an extra state, None without FP8; of a layer, and of each of its experts.
_EXTRA = (
    "self_attention.linear_qkv self_attention.linear_proj self_attention.linear_q_proj self_attention.linear_q_down_proj \
self_attention.linear_q_up_proj self_attention.linear_kv_down_proj self_attention.linear_kv_up_proj self_attention.core_attention \
self_attention.q_layernorm self_attention.k_layernorm self_attention.kv_layernorm input_layernorm pre_mlp_layernorm \
mlp.linear_fc1 mlp.linear_fc2 mlp.shared_experts.linear_fc1 mlp.shared_experts.linear_fc2".split()
)
_EXTRA_OF_EXPERT = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")


@dataclass(frozen=True)
class DistPlan:
    """The plan of an export.

    Attributes:
        source: the model, folded if its layers share experts.
        tensors: by Megatron's name, the parts that make up each global tensor.
    """

    source: GlobalTensors
    arguments: Mapping[str, Any]
    tensors: Mapping[str, list[UnreadTensor]]
    objects: Mapping[str, bytes]
    notes: tuple[str, ...]

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        """The global tensors."""
        return {name: StoredTensor(parts[0].global_shape, parts[0].dtype) for name, parts in self.tensors.items()}


def plan_dist_export(source: GlobalTensors) -> DistPlan:
    """Returns what an export would write; nothing is read yet.

    Equal layers are stacked, as Megatron-Core expects.

    Raises:
        ConfigError: Megatron has no such model.
    """
    notes: list[str] = []
    if source_config(source).moe.shares_experts:
        source = fold_shared(source)
        notes.append("Megatron's layers share no experts: the model is folded into a plain MoE.")
    config = source_config(source)
    refuse_unknown(config, "megatron", "Megatron's checkpoints")
    refuse_parts(source.train_state, "The checkpoint")
    vocab_size = int(source.train_state["vocab_size"])
    padded = padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by)
    if not config.model.swiglu:
        notes.append("GELU here is its tanh form, which Megatron computes with --bias-gelu-fusion only.")
    if padded > vocab_size:
        notes.append(f"Megatron's softmax counts the {padded - vocab_size} rows of padding; here they take no part.")
    is_moe = [layer.moe_index is not None for layer in all_layers(config)]
    is_stacked = len(set(is_moe)) == 1
    arguments = vars(to_arguments(config, vocab_size, padded)) | _run_arguments(source, config)
    arguments |= {"moe_layer_freq": 1} if is_stacked else {}
    layout = MegatronLayout(experts="stacked")
    tensors: dict[str, list[UnreadTensor]] = {}

    def add(key: str, layer: int | None, part: UnreadTensor) -> None:
        if is_stacked and layer is not None:
            key = key.replace(f".{layer}.", ".", 1)
            part = replace(part, global_shape=(len(is_moe), *part.global_shape), at=(layer,))
        tensors.setdefault(key, []).append(part)

    for name in model_names(source):
        stored, layer = source.tensors[name], layer_of(name)
        shape = (padded, *stored.shape[1:]) if name in VOCABULARY else stored.shape
        part = slices_of(name, shape, layer, layout, config.model)[0]
        for key in _names_of(part.name, config.model):
            add(key, layer, UnreadTensor(_reader(source, name, padded, part.take), part.shape, stored.dtype))
        if name.endswith(".moe.router.weight") and not config.model.disable_bias_linear:
            zeros = torch.zeros(config.moe.most_experts, dtype=stored.dtype)
            add(part.name.replace("weight", "bias"), layer, UnreadTensor(zeros.clone, tuple(zeros.shape), zeros.dtype))
    objects = _extra_states(is_moe, config.moe.most_experts, is_stacked)
    return DistPlan(source, arguments, tensors, objects, tuple(notes))


def _run_arguments(source: GlobalTensors, config: PretrainConfig) -> dict[str, Any]:
    """Returns the arguments of a layout, which that of a load replaces, and of a run's progress."""
    axes = ("tensor_model", "pipeline_model", "expert_model", "expert_tensor", "context")
    return {
        **{f"{axis}_parallel_size": 1 for axis in axes},
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "sequence_parallel": False,
        "transformer_impl": "transformer_engine",
        "use_mcore_models": True,
        "ckpt_format": FORMAT,
        "moe_grouped_gemm": config.moe.expert_layout != "dense",
        "moe_use_legacy_grouped_gemm": False,
        "iteration": int(source.train_state.get("iteration", 0)),
        "consumed_train_samples": int(source.train_state.get("consumed_samples", 0)),
        "consumed_valid_samples": 0,
    }


def _names_of(key: str, model: ModelConfig) -> list[str]:
    """Returns the names of a tensor: of a norm that a module may keep, one for each kind of modules of Megatron's."""
    if model.q_lora_rank is None:
        key = key.replace("linear_q_up_proj", "linear_q_proj")
    names = [key]
    for fused, alone in FUSED_NORMS.items():
        if alone in key and (model.multi_latent_attention or "_up_proj" not in fused):
            names.append(key.replace(alone, fused))
    return names


def _reader(source: GlobalTensors, name: str, padded: int, take: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """Returns what reads a part of a tensor; a vocabulary's gets zero rows up to Megatron's rounding."""

    def read() -> Tensor:
        tensor = source.read(name)
        spare = padded - len(tensor) if name in VOCABULARY else 0
        return take(torch.cat((tensor, tensor.new_zeros(spare, *tensor.shape[1:]))) if spare > 0 else tensor)

    return read


def _extra_states(is_moe: list[bool], num_experts: int, is_stacked: bool) -> dict[str, bytes]:
    """Returns an empty state for each module that may ask for one; what a model does not ask for stays unread."""
    buffer, count = io.BytesIO(), len(is_moe)
    torch.save([None], buffer)
    names = ["decoder.final_layernorm._extra_state/shard_0_1"]
    for layer, has_experts in enumerate(is_moe):
        prefix = "decoder.layers" if is_stacked else f"decoder.layers.{layer}"
        at, of = (f"{layer}", f"{count}") if is_stacked else ("0", "1")
        names += [f"{prefix}.{module}._extra_state/shard_{at}_{of}" for module in _EXTRA]
        at, of = (f"{layer}.", f"{count}.") if is_stacked else ("", "")
        names += [
            f"{prefix}.{module}._extra_state/shard_{at}{expert}_{of}{num_experts}"
            for module in _EXTRA_OF_EXPERT
            for expert in range(num_experts if has_experts else 0)
        ]
    return dict.fromkeys(names, buffer.getvalue())


def iteration_name(iteration: int | None) -> str:
    """Returns the name of an iteration's folder, None for Megatron's `release`."""
    return "release" if iteration is None else f"iter_{iteration:07d}"


def write_dist_export(
    plan: DistPlan, root: Path, iteration: int | None, progress: Callable[[int], None] = lambda num_bytes: None
) -> Path:
    """Writes a planned export and returns the folder of its iteration.

    Args:
        iteration: None to write it as Megatron's `release`.
        progress: called with the bytes of each tensor as it is taken up.

    Raises:
        CheckpointError: the iteration is there already, the disk is too small, or it cannot be written.
    """

    def counted(part: UnreadTensor) -> UnreadTensor:
        def read() -> Tensor:
            tensor = part.read()
            progress(tensor.nbytes)
            return tensor

        return replace(part, read=read)

    name = iteration_name(iteration)
    require_space(root, sum(stored.num_bytes for stored in plan.stored.values()))
    with new_folder(root / name) as folder:
        state = {key: [counted(part) for part in parts] for key, parts in plan.tensors.items()}
        write_sharded(state, str(folder), single_process_state(), plan.objects)
        common = {"args": argparse.Namespace(**plan.arguments), "checkpoint_version": CHECKPOINT_VERSION}
        torch.save({**common, "iteration": iteration or 0}, folder / COMMON)
        backends = {"sharded_backend": FORMAT, "sharded_backend_version": 1}
        (folder / DISTRIBUTED).write_text(
            json.dumps({**backends, "common_backend": "torch", "common_backend_version": 1})
        )
    tracker = root / f".{LATEST}.tmp"
    tracker.write_text("release" if iteration is None else str(iteration))
    os.replace(tracker, root / LATEST)
    return root / name
