"""What each rank's model is made of: read from modules on "meta", one layer of each kind, for worlds of any size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import nn

from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.training import TrainingConfig
from megatron_samoe.models.blueprint import Blueprint
from megatron_samoe.models.gpt_stage import GPTStage
from megatron_samoe.models.layer_layout import LayerPlace, StagePlan, stage_plans
from megatron_samoe.models.rank_model import compute_dtype
from megatron_samoe.models.transformer_layer import TransformerLayer
from megatron_samoe.parallel_state.parameter_tag import ParameterTag, tag_of
from megatron_samoe.parallel_state.rank_grid import RankGrid
from megatron_samoe.parallel_state.state import ParallelState, planned_state

Chunks = tuple[StagePlan, ...]


@dataclass(frozen=True)
class DescribedParameter:
    """Parameters of a rank that are alike.

    Attributes:
        numel: elements of all of them that this rank holds.
        largest: elements of one.
    """

    tag: ParameterTag
    numel: int
    largest: int
    element_bytes: int
    is_trained: bool

    @property
    def is_bank(self) -> bool:
        """Whether it is a tensor of what MoE layers share."""
        return self.tag.shard.family == "pool"

    @property
    def whole_numel(self) -> int:
        """Elements of the rank's shard, where it holds a slice of that only."""
        return self.numel if self.tag.slice is None else math.prod(self.tag.slice.shape)


class Description:
    """A model's modules as the ranks of a layout would have them, without storage."""

    def __init__(self, config: PretrainConfig, vocab_size: int, state: ParallelState):
        moe = replace(config.moe, moe_scale_output_init=False)  # first values do not matter here
        self._blueprint = Blueprint(replace(config, moe=moe), vocab_size, state, compute_dtype(config))
        self._layers: dict[int, TransformerLayer] = {}
        self._ends: dict[tuple[bool, bool], GPTStage] = {}

    def layer(self, place: LayerPlace) -> TransformerLayer:
        """Returns a layer like the one at a place: one for each number of experts."""
        if place.num_experts not in self._layers:
            self._layers[place.num_experts] = TransformerLayer(self._blueprint, place)
        return self._layers[place.num_experts]

    def ends(self, plan: StagePlan) -> GPTStage:
        """Returns a stage with the same ends and no layer."""
        key = (plan.has_embedding, plan.has_head)
        if key not in self._ends:
            self._ends[key] = GPTStage(self._blueprint, StagePlan((), *key))
        return self._ends[key]

    def shared_parameters(self, state: ParallelState) -> list[DescribedParameter]:
        """Returns what MoE layers share on one rank."""
        shared = replace(self._blueprint, state=state).sharing.shared_part()
        return [] if shared is None else list(_described(shared))

    def parameters(self, chunks: Chunks) -> list[DescribedParameter]:
        """Returns what a rank with these chunks holds, besides what MoE layers share."""
        found = [p for plan in chunks for p in _described(self.ends(plan))]
        kinds = Counter(place.num_experts for plan in chunks for place in plan.layers)
        places = {place.num_experts: place for plan in chunks for place in plan.layers}
        for kind, count in kinds.items():
            found += _described(self.layer(places[kind]), count)
        return found


def _described(module: nn.Module, count: int = 1) -> Iterator[DescribedParameter]:
    for p in module.parameters():
        yield DescribedParameter(tag_of(p), count * p.numel(), p.numel(), p.element_size(), p.requires_grad)


def state_key(config: PretrainConfig) -> PretrainConfig:
    """Returns the configuration with only what parameters depend on, so that layouts share what was counted."""
    layout, training = config.parallel, config.training
    kept = ParallelConfig(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size, sequence_parallel=layout.sequence_parallel,
    )  # fmt: skip
    selective = "selective" if training.recompute_granularity == "selective" else None
    return PretrainConfig(
        model=config.model, parallel=kept, moe=replace(config.moe, samoe_combine="step"),
        training=TrainingConfig(bf16=training.bf16 or training.fp16, recompute_granularity=selective),
    )  # fmt: skip


def describe(config: PretrainConfig, vocab_size: int) -> Description:
    """Returns the description of a model in a layout.

    Args:
        vocab_size: tokens that exist, before padding.
    """
    return _describe(state_key(config), vocab_size)


@lru_cache(maxsize=1024)
def _describe(config: PretrainConfig, vocab_size: int) -> Description:
    layout = config.parallel
    tp, ep, etp = layout.tensor_model_parallel_size, layout.expert_model_parallel_size, layout.expert_tp
    grid = RankGrid(math.lcm(tp, etp * ep), tp=tp, ep=ep, etp=etp)
    return Description(config, vocab_size, planned_state(grid, 0, layout.sequence_parallel and tp > 1))


@lru_cache(maxsize=1024)
def _shared(config: PretrainConfig, vocab_size: int, grid: RankGrid, rank: int) -> list[DescribedParameter]:
    return _describe(config, vocab_size).shared_parameters(planned_state(grid, rank))


def parameters_of(
    key: PretrainConfig, vocab_size: int, grid: RankGrid, rank: int, chunks: Chunks
) -> list[DescribedParameter]:
    """Returns all parameters of a rank that holds these chunks; `key` is of `state_key`."""
    return _describe(key, vocab_size).parameters(chunks) + _shared(key, vocab_size, grid, rank)


def rank_parameters(config: PretrainConfig, vocab_size: int, grid: RankGrid, rank: int) -> list[DescribedParameter]:
    """Returns all parameters of a rank."""
    chunks = plans_by_rank(config)[pipeline_rank(grid, rank)]
    return parameters_of(state_key(config), vocab_size, grid, rank, chunks)


def shared_parameters(config: PretrainConfig, vocab_size: int, grid: RankGrid, rank: int) -> list[DescribedParameter]:
    """Returns what MoE layers share on a rank."""
    return _shared(state_key(config), vocab_size, grid, rank)


def pipeline_rank(grid: RankGrid, rank: int) -> int:
    """Returns a rank's stage."""
    return rank // (grid.world_size // grid.pp)


def whole_model(config: PretrainConfig, vocab_size: int) -> tuple[Description, Chunks]:
    """Returns the description of the model in one process, and its one chunk."""
    alone = replace(config, parallel=ParallelConfig())
    return describe(alone, vocab_size), plans_by_rank(alone)[0]


def rank_grid(config: PretrainConfig, world_size: int) -> RankGrid:
    """Returns the grid of a layout; ValueError where it does not fill the world."""
    parallel = config.parallel
    return RankGrid(
        world_size, tp=parallel.tensor_model_parallel_size, pp=parallel.pipeline_model_parallel_size,
        ep=parallel.expert_model_parallel_size, etp=parallel.expert_tp,
    )  # fmt: skip


def plans_by_rank(config: PretrainConfig) -> tuple[Chunks, ...]:
    """Returns every pipeline rank's chunks; asked for over and over while layouts are compared, so kept."""
    return _stages(_stage_key(config))[0]


def distinct_stages(config: PretrainConfig) -> tuple[int, ...]:
    """Returns the first pipeline rank of each kind: those that hold as many layers of the same sorts, and the same ends."""
    return _stages(_stage_key(config))[1]


def moe_layers(chunks: Chunks) -> int:
    """Returns the number of MoE layers of a rank's chunks."""
    return sum(place.moe_index is not None for plan in chunks for place in plan.layers)


def _stage_key(config: PretrainConfig) -> PretrainConfig:
    """Returns the configuration with only what says which layers stand on which rank."""
    parallel, moe = config.parallel, config.moe
    default = PretrainConfig()
    return replace(
        default,
        model=replace(default.model, num_layers=config.model.num_layers),
        moe=replace(default.moe, expert_layout=moe.expert_layout, moe_layer_freq=moe.moe_layer_freq,
                    num_experts=moe.num_experts),
        parallel=ParallelConfig(
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            num_layers_per_virtual_pipeline_stage=parallel.num_layers_per_virtual_pipeline_stage,
            pipeline_model_parallel_layout=parallel.pipeline_model_parallel_layout,
        ),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _stages(config: PretrainConfig) -> tuple[tuple[Chunks, ...], tuple[int, ...]]:
    pp = config.parallel.pipeline_model_parallel_size
    plans = stage_plans(config)
    by_rank = tuple(plans[rank::pp] for rank in range(pp))
    seen: dict[tuple, int] = {}
    for rank, chunks in enumerate(by_rank):
        kind = tuple((c.has_embedding, c.has_head, *(x.num_experts for x in c.layers)) for c in chunks)
        seen.setdefault(kind, rank)
    return by_rank, tuple(seen.values())
