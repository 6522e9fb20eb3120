"""Writes a model as Megatron-LM's format `torch_dist`, which loads in every layout."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.convert.edited_model import model_names
from megatron_samoe.convert.hf.parts import VOCABULARY
from megatron_samoe.convert.layer_experts import layer_of
from megatron_samoe.convert.megatron.arguments import to_arguments
from megatron_samoe.convert.megatron.dist_files import COMMON, FORMAT
from megatron_samoe.convert.megatron.export import folded_for_megatron, layout_arguments, notes_of, track, with_rows
from megatron_samoe.convert.megatron.names import FUSED_NORMS, LOCAL, MegatronLayout, slices_of
from megatron_samoe.convert.megatron.rank_files import CHECKPOINT_VERSION, DISTRIBUTED
from megatron_samoe.convert.output_folder import new_folder, require_space
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors, StoredTensor
from megatron_samoe.dist_checkpointing.saving import write_sharded
from megatron_samoe.dist_checkpointing.sharded_state import UnreadTensor
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
    source, config, notes = folded_for_megatron(source)
    vocab_size = int(source.train_state["vocab_size"])
    padded = padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by)
    is_moe = [place.moe_index is not None for place in all_layers(config)]
    is_stacked = len(set(is_moe)) == 1
    arguments = vars(to_arguments(config, vocab_size, padded)) | layout_arguments(source, config, MegatronLayout())
    arguments |= {"ckpt_format": FORMAT, **({"moe_layer_freq": 1} if is_stacked else {})}
    layout = MegatronLayout(1, 1, 1, 1, replace(LOCAL, experts="stacked"))
    tensors: dict[str, list[UnreadTensor]] = {}

    def add(key: str, layer: int | None, part: UnreadTensor) -> None:
        if is_stacked and layer is not None:
            key = key.replace(f".{layer}.", ".", 1)
            part = replace(part, global_shape=(len(is_moe), *part.global_shape), at=(layer,))
        tensors.setdefault(key, []).append(part)

    for name in model_names(source):
        stored, layer = source.tensors[name], layer_of(name)
        shape = (padded, *stored.shape[1:]) if name in VOCABULARY else stored.shape
        part = slices_of(name, shape, layer, is_moe[layer or 0], layout, config.model)[0]
        for key in _names_of(part.name, config.model.multi_latent_attention):
            add(key, layer, UnreadTensor(_taking(source, name, padded, part.take), part.shape, stored.dtype))
        if name.endswith(".moe.router.weight") and not config.model.disable_bias_linear:
            zeros = torch.zeros(config.moe.most_experts, dtype=stored.dtype)
            add(
                part.name.replace("weight", "bias"),
                layer,
                UnreadTensor(zeros.clone, tuple(zeros.shape), zeros.dtype),
            )
    objects = _extra_states(is_moe, config.moe.most_experts, is_stacked)
    return DistPlan(source, arguments, tensors, objects, notes + notes_of(config, vocab_size, padded))


def _names_of(key: str, has_latents: bool) -> list[str]:
    """Returns the names of a tensor: of a norm that a module may keep, one for each kind of modules of Megatron's."""
    names = [key]
    for fused, alone in FUSED_NORMS.items():
        if alone in key and (has_latents or "_up_proj" not in fused):
            names.append(key.replace(alone, fused))
    return names


def _taking(source: GlobalTensors, name: str, padded: int, take: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    return lambda: take(with_rows(source.read(name), name, padded))


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

    name = "release" if iteration is None else f"iter_{iteration:07d}"
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
    track(root, iteration)
    return root / name
