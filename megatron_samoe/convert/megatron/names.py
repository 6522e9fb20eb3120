"""Which tensor of Megatron-core's GPTModel is which part of ours, on which rank: pure names and views.

Both keep query, key and value of a group together, and [out, in] matrices. Megatron flattens the dims that we keep
apart, numbers layers within a pipeline stage and experts within a rank, and cuts each matrix over tensor-parallel ranks
along the same dim as we do; gate and up projections of SwiGLU are each cut, and follow each other on a rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from megatron_samoe.config.model import ModelConfig
from megatron_samoe.convert.hf.parts import Part, in_pairs, matrix, vector, whole
from megatron_samoe.convert.megatron.rank_files import RankPlace

#: How the experts of a layer are named: SequentialMLP's local_experts.0; GroupedMLP's weight1, the transposed matrices of all of
#: a rank's experts in one; all of a layer's in one tensor, as torch_dist has them; or lent by the plug-in, under our names.
ExpertNames = Literal["sequential", "legacy_grouped", "stacked", "lent"]


@dataclass(frozen=True)
class MegatronLayout:
    """The ranks that have files, and the names in them.

    Attributes:
        expert_tensor_parallel: ranks that split each expert, 1 or the tensor-parallel size.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: int = 1
    expert_tensor_parallel: int = 1
    experts: ExpertNames = "sequential"

    def ranks(self) -> list[RankPlace]:
        """Returns all ranks that have a file: Megatron counts tensor ranks fastest, and expert ranks past those of an expert."""
        tp, ep = self.tensor_parallel, self.expert_parallel
        pairs = sorted({(rank % tp, rank // self.expert_tensor_parallel % ep) for rank in range(tp * ep)})
        return [RankPlace(t, p, e) for p in range(self.pipeline_parallel) for t, e in pairs]


@dataclass(frozen=True)
class Slice(Part):
    """One of Megatron's tensors as part of one of ours.

    Attributes:
        tp, ep: the rank that holds it; None for all.
    """

    tp: int | None = None
    ep: int | None = None

    def is_on(self, tp: int, ep: int) -> bool:
        """Returns whether a rank holds it."""
        return self.tp in (None, tp) and self.ep in (None, ep)


#: Tensors outside layers: our name, theirs, and the dim that tensor-parallel ranks split, if any.
_OUTER = {
    "embedding.word.weight": ("embedding.word_embeddings.weight", 0),
    "embedding.position": ("embedding.position_embeddings.weight", None),
    "final_norm.weight": ("decoder.final_layernorm.weight", None),
    "final_norm.bias": ("decoder.final_layernorm.bias", None),
    "output.weight": ("output_layer.weight", 0),
}
#: By our module in a layer: theirs, and these dims of the weight and of the bias.
_MODULES: dict[str, tuple[str, int | None, int | None]] = {
    "attention_norm": ("input_layernorm.{}", None, None),
    "mlp_norm": ("pre_mlp_layernorm.{}", None, None),
    "attention.q_norm": ("self_attention.q_layernorm.{}", None, None),
    "attention.k_norm": ("self_attention.k_layernorm.{}", None, None),
    "attention.kv_norm": ("self_attention.kv_layernorm.{}", None, None),
    "attention.q_down": ("self_attention.linear_q_down_proj.{}", None, None),
    "attention.q_up": ("self_attention.linear_q_up_proj.{}", 0, None),
    "attention.kv_down": ("self_attention.linear_kv_down_proj.{}", None, None),
    "attention.kv_up": ("self_attention.linear_kv_up_proj.{}", 0, None),
    "attention.qkv": ("self_attention.linear_qkv.{}", 0, 0),
    "attention.output": ("self_attention.linear_proj.{}", -1, None),
    "mlp.fc1": ("mlp.linear_fc1.{}", -2, -1),
    "mlp.fc2": ("mlp.linear_fc2.{}", -1, None),
    "moe.router": ("mlp.router.{}", None, None),
    "moe.mixing": ("mlp.shared_experts.gate_{}", None, None),
    "moe.shared_expert.fc1": ("mlp.shared_experts.linear_fc1.{}", -2, -1),
    "moe.shared_expert.fc2": ("mlp.shared_experts.linear_fc2.{}", -1, None),
}


def slices_of(
    name: str, shape: tuple[int, ...], layer: int | None, layout: MegatronLayout, model: ModelConfig
) -> list[Slice]:
    """Returns what one of our tensors is on the ranks of a layout, under names of Megatron-Core's local modules.

    Args:
        shape: of the tensor that the slices are views of.
        layer: the number that its layer has in the files.
        model: whose tensor it is.
    """
    tp = layout.tensor_parallel
    if name in _OUTER:
        return _over_ranks(name, shape, *_OUTER[name], tp)
    if layout.experts == "lent" and _is_lent(name):
        return [Slice(name, name, whole, shape)]
    module, _, leaf = name.split(".", 2)[2].rpartition(".")
    prefix = f"decoder.layers.{layer}."
    if module != "moe.experts":
        theirs, of_weight, of_bias = _MODULES[module]
        key = prefix + theirs.format(leaf)
        if model.multi_latent_attention and module in ("attention.q_up", "attention.kv_down"):
            order = in_pairs(model.qk_head_dim if of_weight == 0 else model.kv_lora_rank, model.qk_pos_emb_head_dim)
            index = () if of_weight == 0 else None
            return [replace(part, order=order) for part in _over_ranks(name, shape, key, of_weight, tp, index=index)]
        return _over_ranks(name, shape, key, of_bias if leaf == "bias" else of_weight, tp)
    kind, number = "weight" if leaf[0] == "w" else "bias", leaf[1]
    _, of_weight, of_bias = _MODULES[f"mlp.fc{number}"]
    dim, per_rank = of_bias if kind == "bias" else of_weight, shape[0] // layout.expert_parallel
    # For each of their tensors its key, and the rank and index of its expert or experts.
    found: list[tuple[str, int, int | slice]]
    if layout.experts == "legacy_grouped":
        assert kind == "weight", "legacy grouped experts have no bias"
        runs = [slice(begin, begin + per_rank) for begin in range(0, shape[0], per_rank)]
        found = [(f"weight{number}", rank, run) for rank, run in enumerate(runs)]
    elif layout.experts == "stacked":
        return [Slice(f"{prefix}mlp.experts.experts.linear_fc{number}.{kind}", name, whole, stacked(shape, kind))]
    else:
        form = f"local_experts.{{}}.linear_fc{number}.{kind}"
        found = [(form.format(e % per_rank), e // per_rank, e) for e in range(shape[0])]
    return [
        part
        for key, ep, index in found
        for part in _over_ranks(
            name, shape, f"{prefix}mlp.experts.{key}", dim, layout.expert_tensor_parallel, ep, index
        )
    ]


#: Norms by the module that may keep them, and as modules of their own.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
}


def _is_lent(name: str) -> bool:
    """Whether a tensor is one of those that the plug-in for Megatron-Core keeps: of a pool, or of a layer's experts."""
    return name.startswith("expert_pool.") or ".moe.experts." in name or name.endswith(".moe.combination")


def stacked(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """Returns the shape of all experts' matrices or biases in one tensor."""
    return (shape[0], *(vector if kind == "bias" else matrix)(torch.Size(shape[1:])))


def _over_ranks(
    name: str,
    shape: tuple[int, ...],
    key: str,
    dim: int | None,
    size: int,
    ep: int | None = None,
    index: int | slice | tuple[()] | None = (),
) -> list[Slice]:
    """Returns one of Megatron's tensors on the tensor-parallel ranks that share it.

    Args:
        dim: that they share, None if each holds all of it, and `size` how many they are.
        index: of its expert in ours, or of experts that it holds each transposed; None for one more dim before ours.
    """
    is_stacked = isinstance(index, slice)

    def view(complete: Tensor, rank: int) -> Tensor:
        own = complete[index] if dim is None else complete[index].tensor_split(size, dim)[rank]
        return own.movedim(-1, 1) if is_stacked else own

    parts = []
    for rank in range(1 if dim is None else size):
        own = view(torch.empty(shape, device="meta"), rank).shape
        join = vector if len(own) < 2 or "bias" in key else matrix
        joined = (own[1], own.numel() // own[1]) if is_stacked and "weight1" in key else join(own)
        tp = None if dim is None or size == 1 else rank
        parts.append(Slice(key, name, partial(view, rank=rank), joined, tp=tp, ep=ep))
    return parts
