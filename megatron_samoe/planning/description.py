"""What each rank's model is made of: read from modules on "meta", one layer of each kind, for worlds of any size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import nn

from megatron_samoe.config.model import ModelConfig
from megatron_samoe.config.moe import MoEConfig
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
        self._known: dict[int, tuple[DescribedParameter, ...]] = {}

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

    def shared_parameters(self, state: ParallelState) -> tuple[DescribedParameter, ...]:
        """Returns what MoE layers share on one rank."""
        blueprint = self._blueprint
        shared = blueprint.parts.sharing(replace(blueprint.sharing_context, state=state)).shared_part()
        return () if shared is None else _described(shared)

    def parameters(self, chunks: Chunks) -> list[DescribedParameter]:
        """Returns what a rank with these chunks holds, besides what MoE layers share."""
        found = [p for plan in chunks for p in self._described(self.ends(plan))]
        kinds = Counter(place.num_experts for plan in chunks for place in plan.layers)
        places = {place.num_experts: place for plan in chunks for place in plan.layers}
        for kind, count in kinds.items():
            found += [replace(p, numel=count * p.numel) for p in self._described(self.layer(places[kind]))]
        return found

    def _described(self, module: nn.Module) -> tuple[DescribedParameter, ...]:
        if id(module) not in self._known:
            self._known[id(module)] = _described(module)
        return self._known[id(module)]


def _described(module: nn.Module) -> tuple[DescribedParameter, ...]:
    """Returns a module's parameters; those that lie and are reduced alike as one."""
    alike: dict[tuple, DescribedParameter] = {}
    for number, p in enumerate(module.parameters()):
        tag, numel = tag_of(p), p.numel()
        key: tuple = (tag.gradient_group, p.element_size(), p.requires_grad, tag.is_routed_expert)
        if tag.shard.family == "pool":
            key = (number,)  # exchanged one by one
        before = alike.get(key)
        total, largest = (before.numel, before.largest) if before is not None else (0, 0)
        alike[key] = DescribedParameter(tag, total + numel, max(largest, numel), p.element_size(), p.requires_grad)
    return tuple(alike.values())


class PlannedModel:
    """A model in a layout of a world that need not exist.

    Args:
        vocab_size: tokens that exist, before padding.

    Attributes:
        chunks_of_stage: every pipeline rank's chunks.
        distinct_stages: the first pipeline rank of each kind: those that hold as many layers of the same sorts, and the
            same ends.

    Raises:
        ValueError: the layout does not fill the world.
    """

    def __init__(self, config: PretrainConfig, vocab_size: int, world_size: int):
        layout, training = config.parallel, config.training
        self.config, self.grid = config, RankGrid.of(layout, world_size)
        grid = self.grid
        # Layouts that differ in other things share what was counted.
        moe = replace(config.moe, samoe_combine="step") if config.moe.samoe_combine != "step" else config.moe
        self.description = _describe(
            config.model, moe, vocab_size, grid.tp, grid.ep, grid.etp, layout.sequence_parallel and grid.tp > 1,
            training.bf16 or training.fp16, training.recompute_granularity == "selective",
        )  # fmt: skip
        self.chunks_of_stage, self.distinct_stages = _stages(
            grid.pp, layout.num_layers_per_virtual_pipeline_stage, layout.pipeline_model_parallel_layout,
            config.model.num_layers, config.moe.expert_layout, config.moe.moe_layer_freq, config.moe.num_experts,
        )  # fmt: skip

    def stage_of(self, rank: int) -> int:
        """Returns a rank's pipeline rank."""
        return rank // (self.grid.world_size // self.grid.pp)

    def parameters(self, rank: int) -> list[DescribedParameter]:
        """Returns all parameters of a rank."""
        own = self.description.parameters(self.chunks_of_stage[self.stage_of(rank)])
        return [*own, *self.shared_parameters(rank)]

    def shared_parameters(self, rank: int) -> tuple[DescribedParameter, ...]:
        """Returns what MoE layers share on a rank."""
        return _shared(self.description, self.grid, rank)

    def layers(self) -> Iterator[LayerPlace]:
        """Yields all layers, stage by stage."""
        for chunks in self.chunks_of_stage:
            for plan in chunks:
                yield from plan.layers

    def moe_layers(self, stage: int) -> int:
        """Returns the MoE layers of a pipeline rank."""
        return sum(place.moe_index is not None for plan in self.chunks_of_stage[stage] for place in plan.layers)


def whole_model(config: PretrainConfig, vocab_size: int) -> PlannedModel:
    """Returns the model in one process."""
    return PlannedModel(replace(config, parallel=ParallelConfig()), vocab_size, 1)


@lru_cache(maxsize=1024)
def _describe(
    model: ModelConfig, moe: MoEConfig, vocab_size: int, tp: int, ep: int, etp: int, sequence_parallel: bool, low: bool,
    selective: bool,
) -> Description:  # fmt: skip
    grid = RankGrid(math.lcm(tp, etp * ep), tp=tp, ep=ep, etp=etp)
    training = TrainingConfig(bf16=low, recompute_granularity="selective" if selective else None)
    layout = ParallelConfig(
        tensor_model_parallel_size=tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp
    )
    config = PretrainConfig(model=model, moe=moe, parallel=layout, training=training)
    return Description(config, vocab_size, planned_state(grid, 0, sequence_parallel))


@lru_cache(maxsize=4096)
def _shared(description: Description, grid: RankGrid, rank: int) -> tuple[DescribedParameter, ...]:
    return description.shared_parameters(planned_state(grid, rank))


@lru_cache(maxsize=1024)
def _stages(
    pp: int, per_stage: int | None, layout: str | None, num_layers: int, expert_layout: Any, moe_layer_freq: str,
    num_experts: int | tuple[int, ...],
) -> tuple[tuple[Chunks, ...], tuple[int, ...]]:  # fmt: skip
    parallel = ParallelConfig(
        pipeline_model_parallel_size=pp, num_layers_per_virtual_pipeline_stage=per_stage,
        pipeline_model_parallel_layout=layout,
    )  # fmt: skip
    moe = MoEConfig(expert_layout=expert_layout, moe_layer_freq=moe_layer_freq, num_experts=num_experts)
    plans = stage_plans(PretrainConfig(model=ModelConfig(num_layers=num_layers), moe=moe, parallel=parallel))
    by_rank = tuple(plans[rank::pp] for rank in range(pp))
    seen: dict[tuple, int] = {}
    for rank, chunks in enumerate(by_rank):
        kind = tuple((c.has_embedding, c.has_head, *(x.num_experts for x in c.layers)) for c in chunks)
        seen.setdefault(kind, rank)
    return by_rank, tuple(seen.values())
