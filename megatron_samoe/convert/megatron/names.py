"""Which tensor of Megatron-core's GPTModel is which part of ours: pure names and shapes.

Both keep query, key and value of a group together, and [out, in] matrices. Megatron flattens the dims that we keep
apart, numbers layers within a pipeline stage and experts within a rank, and cuts each matrix over tensor-parallel ranks
along the same dim as we do; gate and up projections of SwiGLU are each cut, and stand one after the other on a rank.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

ExpertStyle = Literal["grouped", "sequential", "legacy_grouped"]


@dataclass(frozen=True)
class MegatronStyle:
    """Which of Megatron's modules the names are for.

    Attributes:
        transformer_impl: transformer_engine keeps the norm before a matrix in the matrix's module; local does not.
        experts: grouped: TEGroupedMLP's linear_fc1.weight0; sequential: SequentialMLP's local_experts.0; legacy_grouped:
            GroupedMLP's weight1, the transposed matrices of all of a rank's experts in one.
    """

    transformer_impl: Literal["transformer_engine", "local"] = "transformer_engine"
    experts: ExpertStyle = "grouped"


@dataclass(frozen=True)
class Part:
    """One of Megatron's tensors as part of one of ours.

    Attributes:
        key: Megatron's name with {layer}, and {expert} within a rank.
        layer: in the whole model, or None.
        experts: run of global expert ids that it holds, or None.
        split_dim: dim, after the expert's, that tensor-parallel ranks share; None if all hold it whole.
        num_flat: leading dims, after the expert's, that Megatron has as one.
        is_stacked: it holds all experts of the run, each transposed.
    """

    key: str
    layer: int | None = None
    experts: tuple[int, int] | None = None
    split_dim: int | None = None
    num_flat: int = 1
    is_stacked: bool = False

    def cut(self, whole: Tensor, tp_rank: int, tp_size: int) -> Tensor:
        """Returns Megatron's tensor on a tensor-parallel rank, a copy, from our whole tensor."""
        own = self._own(whole, tp_rank, tp_size)
        if not self.is_stacked:
            return own.flatten(0, self.num_flat - 1).clone()
        matrices = own.flatten(1, self.num_flat).transpose(1, 2).contiguous()  # [e, in, out]
        wide = "weight1" in self.key
        return matrices.view(matrices.shape[1], -1) if wide else matrices.view(-1, matrices.shape[2])

    def paste(self, whole: Tensor, local: Tensor, tp_rank: int, tp_size: int) -> None:
        """Writes a rank's tensor into its place in ours."""
        own = self._own(whole, tp_rank, tp_size)
        if self.is_stacked:
            flat = own.flatten(1, self.num_flat)
            local = local.contiguous().view(len(flat), flat.shape[2], flat.shape[1]).transpose(1, 2)
        own.copy_(local.reshape(own.shape))

    def _own(self, whole: Tensor, tp_rank: int, tp_size: int) -> Tensor:
        """Returns a view of our tensor with what a tensor-parallel rank holds of this part."""
        dim = self.split_dim
        if self.is_stacked:
            assert self.experts is not None and dim is not None
            whole, dim = whole[self.experts[0] : self.experts[1]], dim + 1
        elif self.experts is not None:
            whole = whole[self.experts[0]]
        return whole if dim is None else whole.chunk(tp_size, dim)[tp_rank]

    def local_shape(self, shape: tuple[int, ...], tp_size: int) -> tuple[int, ...]:
        """Returns the shape of a rank's tensor; `shape` is our whole tensor's."""
        inner = self._inner_shape(shape, tp_size)
        flat = (math.prod(inner[: self.num_flat]), *inner[self.num_flat :])
        if not self.is_stacked:
            return flat
        assert self.experts is not None
        count = self.experts[1] - self.experts[0]
        return (flat[1], count * flat[0]) if "weight1" in self.key else (count * flat[1], flat[0])

    def _inner_shape(self, shape: tuple[int, ...], tp_size: int) -> tuple[int, ...]:
        inner = list(shape if self.experts is None else shape[1:])
        if self.split_dim is not None:
            inner[self.split_dim] //= tp_size
        return tuple(inner)


_OUTER = {
    "embedding.word.weight": Part("embedding.word_embeddings.weight", split_dim=0),
    "embedding.position": Part("embedding.position_embeddings.weight"),
    "final_norm.weight": Part("decoder.final_layernorm.weight"),
    "final_norm.bias": Part("decoder.final_layernorm.bias"),
    "output.weight": Part("output_layer.weight", split_dim=0),
}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def parts_of(name: str, shape: tuple[int, ...], style: MegatronStyle, is_moe: bool, ep_size: int = 1) -> list[Part]:
    """Returns the parts that one of our tensors is in Megatron's files; one, or one for each expert or run of experts.

    Args:
        is_moe: whether the tensor's layer has experts.
    """
    if name in _OUTER:
        return [_OUTER[name]]
    match = _LAYER.fullmatch(name)
    assert match is not None, name
    layer, rest = int(match[1]), match[2]
    prefix = "decoder.layers.{layer}."
    module, _, leaf = rest.rpartition(".")
    if module in ("attention_norm", "mlp_norm"):
        return [Part(prefix + _norm_key(module, leaf, style, is_moe), layer)]
    if module in ("attention.q_norm", "attention.k_norm"):
        return [Part(f"{prefix}self_attention.{module[10]}_layernorm.{leaf}", layer)]
    if module == "attention.qkv":
        return [Part(f"{prefix}self_attention.linear_qkv.{leaf}", layer, split_dim=0, num_flat=3)]
    if module == "attention.output":
        return [Part(f"{prefix}self_attention.linear_proj.{leaf}", layer, split_dim=1 if leaf == "weight" else None)]
    if module == "moe.router":
        return [Part(f"{prefix}mlp.router.{leaf}", layer)]
    if module == "moe.mixing":
        return [Part(f"{prefix}mlp.shared_experts.gate_weight", layer)]
    if module == "moe.experts":
        return _expert_parts(prefix, layer, leaf, shape, style, ep_size)
    owner, linear = module.rsplit(".", 1)
    place = {"mlp": "mlp", "moe.shared_expert": "mlp.shared_experts"}[owner]
    split_dim, num_flat = _mlp_split(linear, leaf, len(shape))
    return [Part(f"{prefix}{place}.linear_{linear}.{leaf}", layer, split_dim=split_dim, num_flat=num_flat)]


def _norm_key(module: str, leaf: str, style: MegatronStyle, is_moe: bool) -> str:
    fused = style.transformer_impl == "transformer_engine"
    if module == "attention_norm":
        return f"self_attention.linear_qkv.layer_norm_{leaf}" if fused else f"input_layernorm.{leaf}"
    # The norm before experts stands alone, since router and experts share its result.
    return f"mlp.linear_fc1.layer_norm_{leaf}" if fused and not is_moe else f"pre_mlp_layernorm.{leaf}"


def _mlp_split(linear: str, leaf: str, dims: int) -> tuple[int | None, int]:
    """Returns (split_dim, num_flat) of an MLP's tensor with so many dims."""
    if linear == "fc2":
        return (1 if leaf == "weight" else None), 1
    num_out = dims - (1 if leaf == "weight" else 0)  # 2 where gate and up are apart
    return num_out - 1, num_out


def _expert_parts(
    prefix: str, layer: int, kind: str, shape: tuple[int, ...], style: MegatronStyle, ep_size: int
) -> list[Part]:
    linear, leaf = f"fc{kind[1]}", "weight" if kind[0] == "w" else "bias"
    split_dim, num_flat = _mlp_split(linear, leaf, len(shape) - 1)
    per_rank = shape[0] // ep_size
    if style.experts == "legacy_grouped":
        assert leaf == "weight", "legacy grouped experts have no bias"
        key = f"{prefix}mlp.experts.weight{kind[1]}"
        return [
            Part(key, layer, (rank * per_rank, (rank + 1) * per_rank), split_dim, num_flat, is_stacked=True)
            for rank in range(ep_size)
        ]
    form = {
        "grouped": f"mlp.experts.linear_{linear}.{leaf}{{expert}}",
        "sequential": f"mlp.experts.local_experts.{{expert}}.linear_{linear}.{leaf}",
    }[style.experts]
    return [Part(prefix + form, layer, (e, e + 1), split_dim, num_flat) for e in range(shape[0])]


def ep_rank_of(part: Part, num_experts: int, ep_size: int) -> int | None:
    """Returns the expert-parallel rank that holds a part; None where all do."""
    return None if part.experts is None else part.experts[0] // (num_experts // ep_size)


def key_of(part: Part, layer: int | None, experts_per_rank: int) -> str:
    """Returns a part's name in a file.

    Args:
        layer: its number there.
    """
    expert = None if part.experts is None else part.experts[0] % experts_per_rank
    return part.key.format(layer=layer, expert=expert)
