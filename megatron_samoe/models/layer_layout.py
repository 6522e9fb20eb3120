"""The layout of layers by pure arithmetic: which are MoE, and which pipeline stage holds each."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from megatron_samoe.config.derived import (
    experts_per_layer,
    parse_moe_layer_freq,
    parse_stage_layout,
    sharing_map,
    virtual_stages,
)
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import ExpertSource
from megatron_samoe.moved import names_moved


@dataclass(frozen=True)
class LayerSpec:
    """The position of one transformer layer in the model, and its kind.

    Attributes:
        index: among all layers.
        moe_index: among MoE layers, or None for a layer with a dense MLP.
        num_experts: routed experts (E); 0 for a layer with a dense MLP.
        source: source of the experts; None for a layer with a dense MLP.
        window: most keys that a token attends to; None for all before it.
    """

    index: int
    moe_index: int | None = None
    num_experts: int = 0
    source: ExpertSource | None = None
    window: int | None = None


@dataclass(frozen=True)
class StagePlan:
    """The layers and ends that one (virtual) pipeline stage holds; it may hold no layer."""

    layers: tuple[LayerSpec, ...]
    has_embedding: bool
    has_head: bool


def all_layers(config: PretrainConfig) -> tuple[LayerSpec, ...]:
    """Returns the layers of the full model in order."""
    num_layers = config.model.num_layers
    windows = [config.model.window_of(i) for i in range(num_layers)]
    if config.moe.expert_layout == "dense":
        return tuple(LayerSpec(i, window=windows[i]) for i in range(num_layers))
    is_moe = parse_moe_layer_freq(config.moe.moe_layer_freq, num_layers)
    moe_layers = zip(itertools.count(), experts_per_layer(config.moe, sum(is_moe)), sharing_map(config), strict=False)
    return tuple(
        LayerSpec(i, *next(moe_layers), window=windows[i]) if moe else LayerSpec(i, window=windows[i])
        for i, moe in enumerate(is_moe)
    )


def stage_plans(config: PretrainConfig) -> tuple[StagePlan, ...]:
    """Returns the plans of all virtual stages in the order that a token passes them.

    Virtual stage v is chunk v // pp of pipeline rank v % pp.
    """
    counts = layers_per_stage(config.parallel, config.model.num_layers)
    specs = all_layers(config)
    plans, start = [], 0
    for stage, count in enumerate(counts):
        layers = specs[start : start + count]
        plans.append(StagePlan(layers, has_embedding=stage == 0, has_head=stage == len(counts) - 1))
        start += count
    return tuple(plans)


def layers_per_stage(parallel: ParallelConfig, num_layers: int) -> tuple[int, ...]:
    """Returns the number of layers of each virtual stage of a legal configuration."""
    if parallel.pipeline_model_parallel_layout is not None:
        return parse_stage_layout(parallel.pipeline_model_parallel_layout)
    stages = virtual_stages(parallel, num_layers)
    return (num_layers // stages,) * stages


def rank_plans(config: PretrainConfig, pipeline_rank: int) -> tuple[StagePlan, ...]:
    """Returns the plans of one pipeline rank's chunks."""
    return stage_plans(config)[pipeline_rank :: config.parallel.pipeline_model_parallel_size]


def moe_layers_of(config: PretrainConfig, pipeline_rank: int) -> tuple[int, ...]:
    """Returns the indices, among MoE layers, of the layers that one pipeline rank holds."""
    layers = [layer for plan in rank_plans(config, pipeline_rank) for layer in plan.layers]
    return tuple(layer.moe_index for layer in layers if layer.moe_index is not None)


__getattr__ = names_moved(__name__, {"LayerPlace": LayerSpec})
