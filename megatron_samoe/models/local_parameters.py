"""What each rank's model is made of, without building it: parameters by the group that sums their gradients.

Pure arithmetic on the configuration, for worlds of any size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from megatron_samoe.config.model import ModelConfig
from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.models.layer_layout import StagePlan, stage_plans
from megatron_samoe.parallel_state.rank_grid import GROUPS, RankGrid
from megatron_samoe.tensor_parallel.layers import padded_vocab_size

FP32_BYTES = 4
Chunks = tuple[StagePlan, ...]
ExpertLayout = Literal["dense", "moe", "samoe"]


@dataclass(frozen=True)
class RankPlace:
    """One rank's place in all groups, found without listing any group's ranks."""

    grid: RankGrid
    rank: int

    def group_size(self, name: str) -> int:
        """Returns the members of this rank's group."""
        axes_grid, varying = GROUPS[name]
        sizes = self.grid.axes(axes_grid)
        if name == "embed_dp":
            is_outer = self.grid.coordinates(self.rank, "dense")["pp"] in (0, self.grid.pp - 1)
            return sizes["dp"] * (min(self.grid.pp, 2) if is_outer else 1)
        return math.prod(sizes[axis] for axis in varying)

    def group_rank(self, name: str) -> int:
        """Returns this rank's place among the members, which are in rising order."""
        axes_grid, varying = GROUPS[name]
        position, stride, place = self.grid.coordinates(self.rank, axes_grid), 1, 0
        for axis, size in self.grid.axes(axes_grid).items():
            if axis not in varying:
                continue
            own = position[axis]
            if name == "embed_dp" and axis == "pp":
                own = 1 if 0 < own == self.grid.pp - 1 else 0
            place, stride = place + own * stride, stride * size
        return place

    @property
    def pipeline_rank(self) -> int:
        """The rank's stage."""
        return self.rank // (self.grid.world_size // self.grid.pp)


@dataclass(frozen=True)
class LocalParameter:
    """Parameters of a rank that are kept and reduced alike.

    Attributes:
        group: named group over which their gradients are summed.
        numel: elements of this rank's part.
        element_bytes: of the weights; gradients and optimizer state are fp32.
        is_bank: whether they are one tensor of the shared pool.
        is_shared_out: whether that tensor is shared out among its holders, by itself.
        is_expert: whether they are routed experts, own or pooled.
    """

    group: str
    numel: int
    element_bytes: int
    is_trained: bool = True
    is_bank: bool = False
    is_shared_out: bool = False
    is_expert: bool = False


def rank_grid(config: PretrainConfig, world_size: int) -> RankGrid:
    """Returns the grid of a layout; ValueError where it does not fill the world."""
    parallel = config.parallel
    return RankGrid(
        world_size, tp=parallel.tensor_model_parallel_size, pp=parallel.pipeline_model_parallel_size,
        ep=parallel.expert_model_parallel_size, etp=parallel.expert_tp,
    )  # fmt: skip


def plans_by_rank(config: PretrainConfig) -> tuple[Chunks, ...]:
    """Returns every pipeline rank's chunks; asked for over and over while layouts are compared, so kept."""
    return _stages(*_stage_key(config))[0]


def distinct_stages(config: PretrainConfig) -> tuple[int, ...]:
    """Returns the first pipeline rank of each kind: those that hold as many layers of the same sorts, and the same ends."""
    return _stages(*_stage_key(config))[1]


def _stage_key(config: PretrainConfig) -> tuple[int, int | None, str | None, int, ExpertLayout, str]:
    parallel, moe = config.parallel, config.moe
    return (
        parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage,
        parallel.pipeline_model_parallel_layout, config.model.num_layers, moe.expert_layout, moe.moe_layer_freq,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _stages(
    pp: int,
    per_stage: int | None,
    layout: str | None,
    num_layers: int,
    expert_layout: ExpertLayout,
    moe_layer_freq: str,
) -> tuple[tuple[Chunks, ...], tuple[int, ...]]:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=pp, num_layers_per_virtual_pipeline_stage=per_stage,
        pipeline_model_parallel_layout=layout,
    )  # fmt: skip
    moe = replace(MoEConfig(), expert_layout=expert_layout, moe_layer_freq=moe_layer_freq)
    plans = stage_plans(PretrainConfig(model=ModelConfig(num_layers=num_layers), moe=moe, parallel=parallel))
    by_rank = tuple(plans[rank::pp] for rank in range(pp))
    seen: dict[tuple, int] = {}
    for rank, chunks in enumerate(by_rank):
        kind = tuple((c.has_embedding, c.has_head, *(x.moe_index is None for x in c.layers)) for c in chunks)
        seen.setdefault(kind, rank)
    return by_rank, tuple(seen.values())


def compute_bytes(config: PretrainConfig) -> int:
    """Returns the bytes of a weight or activation."""
    return 2 if config.training.bf16 or config.training.fp16 else FP32_BYTES


def local_parameters(config: PretrainConfig, vocab_size: int, place: RankPlace) -> list[LocalParameter]:
    """Returns all parameters of a rank, as the model's constructors make them."""
    model, tp = config.model, place.grid.tp
    size, hidden = compute_bytes(config), model.hidden_size
    token_wise = _token_wise_group(config, place)
    tied = not model.untie_embeddings_and_output_weights
    words = padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by) * hidden // tp
    found = []
    plans = plans_by_rank(config)[place.pipeline_rank]
    for plan in plans:
        if plan.has_embedding or (plan.has_head and tied):
            found.append(LocalParameter("embed_dp" if tied else "dp", words, size))
        if plan.has_embedding and model.position_embedding_type == "learned_absolute":
            found.append(LocalParameter(token_wise, model.max_positions * hidden, size))
        if plan.has_head:
            found.append(LocalParameter(token_wise, _norm(config, hidden), size))
            if not tied:
                found.append(LocalParameter("dp", words, size))
    counts = Counter(layer.moe_index is not None for plan in plans for layer in plan.layers)
    for is_moe, count in counts.items():
        found += _layer_parameters(config, is_moe, count, place)
    return found + bank_parameters(config, place)


def _token_wise_group(config: PretrainConfig, place: RankPlace) -> str:
    return "tp_dp" if config.parallel.sequence_parallel and place.grid.tp > 1 else "dp"


def _norm(config: PretrainConfig, size: int) -> int:
    return size * (2 if config.model.normalization == "LayerNorm" else 1)


def _layer_parameters(config: PretrainConfig, is_moe: bool, count: int, place: RankPlace) -> Iterable[LocalParameter]:
    """Yields the parameters of so many layers of one sort."""
    model, moe, tp = config.model, config.moe, place.grid.tp
    size, hidden, token_wise = compute_bytes(config), model.hidden_size, _token_wise_group(config, place)
    qkv = (model.num_attention_heads + 2 * model.num_kv_heads) * model.head_dim
    split = qkv * hidden + model.num_attention_heads * model.head_dim * hidden + (qkv if model.qkv_bias else 0)
    whole = 2 * _norm(config, hidden) + (0 if model.disable_bias_linear else hidden)
    if model.qk_layernorm:
        yield LocalParameter("tp_dp", count * 2 * _norm(config, model.head_dim), size)
    dense_width = moe.moe_shared_expert_intermediate_size if is_moe else model.mlp_size
    if dense_width is not None:
        matrices, bias_in, bias_out = _mlp(config, dense_width)
        split, whole = split + matrices + bias_in, whole + bias_out
    yield LocalParameter("dp", count * (split // tp), size)
    yield LocalParameter(token_wise, count * whole, size)
    if not is_moe:
        return
    yield LocalParameter(token_wise, count * moe.num_experts * hidden, FP32_BYTES)
    experts = count * (moe.num_experts // place.grid.ep)
    if not moe.has_pool:
        matrices, bias_in, bias_out = _mlp(config, config.expert_ffn_size)
        yield LocalParameter("edp", experts * (matrices + bias_in) // place.grid.etp, size, is_expert=True)
        yield LocalParameter("etp_edp", experts * bias_out, size, is_expert=True)
        return
    by_expert = moe.samoe_granularity == "expert"
    coefficients = 2 * moe.num_expert_banks * (experts if by_expert else count)
    group = "etp_edp" if by_expert else "stage"
    yield LocalParameter(group, coefficients, FP32_BYTES, is_trained=not moe.samoe_freeze_coefficients)


def _mlp(config: PretrainConfig, width: int) -> tuple[int, int, int]:
    """Returns the elements of an MLP's matrices, input bias and output bias."""
    model = config.model
    up, bias = (2 * width if model.swiglu else width), not model.disable_bias_linear
    return (up + width) * model.hidden_size, up * bias, model.hidden_size * bias


def bank_parameters(config: PretrainConfig, place: RankPlace) -> list[LocalParameter]:
    """Returns the pool's tensors on a rank, as if it held whole banks."""
    model, moe = config.model, config.moe
    if not moe.has_pool:
        return []
    width = config.expert_ffn_size
    up = 2 * width if model.swiglu else width
    experts = moe.num_expert_banks * moe.num_experts // place.grid.ep
    etp = place.grid.etp
    tensors = [
        ("pool_dp", experts * up * model.hidden_size // etp),
        ("pool_dp", experts * width * model.hidden_size // etp),
    ]
    if not model.disable_bias_linear:
        tensors += [("pool_dp", experts * up // etp), ("etp_pool_dp", experts * model.hidden_size)]
    shared_out = moe.samoe_pool_placement == "sharded" and place.group_size("pool_dp") > 1
    return [
        LocalParameter(group, numel, FP32_BYTES, is_bank=True, is_shared_out=shared_out, is_expert=True)
        for group, numel in tensors
    ]
