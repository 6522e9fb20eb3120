"""The parameters of each rank's model, read from one layer of each kind on "meta", for worlds of any size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import nn

from megatron_samoe.config.model import ModelConfig
from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import Source
from megatron_samoe.config.training import TrainingConfig
from megatron_samoe.models.blueprint import Blueprint
from megatron_samoe.models.gpt_stage import GPTStage
from megatron_samoe.models.layer_layout import LayerPlace, StagePlan, stage_plans
from megatron_samoe.models.rank_model import compute_dtype
from megatron_samoe.models.transformer_layer import TransformerLayer
from megatron_samoe.moe.sharing.way import LenderCosts
from megatron_samoe.parallel_state.parameter_tag import ParameterTag, tag_of
from megatron_samoe.parallel_state.rank_grid import RankGrid
from megatron_samoe.parallel_state.state import ParallelState, planned_state

Chunks = tuple[StagePlan, ...]


@dataclass(frozen=True)
class DescribedParameter:
    """Parameters of a rank with the same gradient group and dtype.

    Attributes:
        numel: elements of all these parameters that this rank holds.
        largest: elements of the largest of them.
    """

    tag: ParameterTag
    numel: int
    largest: int
    element_bytes: int
    is_trained: bool

    @property
    def whole_numel(self) -> int:
        """Elements of the rank's whole shard, also where it holds only a slice of it."""
        return self.numel if self.tag.slice is None else math.prod(self.tag.slice.shape)


class Description:
    """A model's modules as the ranks of a layout hold them, without storage."""

    def __init__(self, config: PretrainConfig, vocab_size: int, state: ParallelState):
        moe = replace(config.moe, moe_scale_output_init=False)  # first values do not matter here
        self._blueprint = Blueprint(replace(config, moe=moe), vocab_size, state, compute_dtype(config))
        self._layers: dict[tuple, TransformerLayer] = {}
        self._ends: dict[tuple[bool, bool], GPTStage] = {}
        self._known: dict[int, tuple[DescribedParameter, ...]] = {}

    def layer(self, place: LayerPlace) -> TransformerLayer:
        """Returns a layer like the one at a place; each number of experts and way of sharing has one."""
        if _kind(place) not in self._layers:
            self._layers[_kind(place)] = TransformerLayer(self._blueprint, place)
        return self._layers[_kind(place)]

    def ends(self, plan: StagePlan) -> GPTStage:
        """Returns a stage with the same ends and no layer."""
        key = (plan.has_embedding, plan.has_head)
        if key not in self._ends:
            self._ends[key] = GPTStage(self._blueprint, StagePlan((), *key))
        return self._ends[key]

    def shared(self, chunks_of_stage: tuple[Chunks, ...], state: ParallelState, moe: MoEConfig) -> SharedExperts:
        """Returns the experts that MoE layers share on one rank, and the cost of lending them.

        Args:
            moe: the MoE options to use; they may differ from the model's only in options that change no parameter.
        """
        layers_of_stage = tuple(tuple(place.moe_index for place in moe_places(chunks)) for chunks in chunks_of_stage)
        context = replace(self._blueprint.sharing_context, config=moe, state=state, layers_of_stage=layers_of_stage)  # type: ignore[arg-type]
        way = self._blueprint.parts.sharing(context)
        part = way.shared_part()
        if part is None:
            return SharedExperts((), LenderCosts())
        own = {place.moe_index: self.layer(place).moe.experts for place in moe_places(chunks_of_stage[state.pp.rank])}
        return SharedExperts(_described(part), way.lender(own, part).costs())  # type: ignore[arg-type]

    def parameters(self, chunks: Chunks) -> list[DescribedParameter]:
        """Returns the parameters that a rank with these chunks holds, besides experts that MoE layers share."""
        found = [p for plan in chunks for p in self._described(self.ends(plan))]
        kinds = Counter(_kind(place) for plan in chunks for place in plan.layers)
        places = {_kind(place): place for plan in chunks for place in plan.layers}
        for kind, count in kinds.items():
            found += [replace(p, numel=count * p.numel) for p in self._described(self.layer(places[kind]))]
        return found

    def _described(self, module: nn.Module) -> tuple[DescribedParameter, ...]:
        if id(module) not in self._known:
            self._known[id(module)] = _described(module)
        return self._known[id(module)]


@dataclass(frozen=True)
class SharedExperts:
    """The experts that MoE layers share on one rank, and the cost of lending them there."""

    parameters: tuple[DescribedParameter, ...]
    costs: LenderCosts


def _kind(place: LayerPlace) -> tuple:
    """Returns the key of layers with the same parameters."""
    return place.num_experts, place.source and place.source.way


def moe_places(chunks: Chunks) -> list[LayerPlace]:
    """Returns the MoE layers of a pipeline rank's chunks."""
    return [place for plan in chunks for place in plan.layers if place.moe_index is not None]


def _described(module: nn.Module) -> tuple[DescribedParameter, ...]:
    """Returns a module's parameters; those that are sharded and reduced alike count as one."""
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
    """A model in a layout, for a world that need not exist.

    Args:
        vocab_size: number of tokens, before padding.

    Attributes:
        chunks_of_stage: chunks of every pipeline rank.
        distinct_stages: the first pipeline rank of each kind; ranks of a kind hold equally many layers of the same
            kinds, and the same ends.

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
            config.model.num_layers, moe,
        )  # fmt: skip

    def stage_of(self, rank: int) -> int:
        """Returns the pipeline rank of a rank."""
        return rank // (self.grid.world_size // self.grid.pp)

    def first_rank_of(self, stage: int) -> int:
        """Returns the first rank of a pipeline rank's stage."""
        return stage * (self.grid.world_size // self.grid.pp)

    def parameters(self, rank: int) -> list[DescribedParameter]:
        """Returns all parameters of a rank."""
        own = self.description.parameters(self.chunks_of_stage[self.stage_of(rank)])
        return [*own, *self.shared(rank).parameters]

    def shared(self, rank: int) -> SharedExperts:
        """Returns the experts that MoE layers share on a rank."""
        return _shared(self.description, self.grid, rank, self.chunks_of_stage, self.config.moe)

    def layers(self) -> Iterator[LayerPlace]:
        """Yields all layers, stage by stage."""
        for chunks in self.chunks_of_stage:
            for plan in chunks:
                yield from plan.layers


def whole_model(config: PretrainConfig, vocab_size: int) -> PlannedModel:
    """Returns the planned model of one process."""
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
def _shared(
    description: Description, grid: RankGrid, rank: int, chunks_of_stage: tuple[Chunks, ...], moe: MoEConfig
) -> SharedExperts:
    return description.shared(chunks_of_stage, planned_state(grid, rank), moe)


@lru_cache(maxsize=1024)
def _stages(
    pp: int, per_stage: int | None, layout: str | None, num_layers: int, moe: MoEConfig
) -> tuple[tuple[Chunks, ...], tuple[int, ...]]:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=pp, num_layers_per_virtual_pipeline_stage=per_stage,
        pipeline_model_parallel_layout=layout,
    )  # fmt: skip
    plans = stage_plans(PretrainConfig(model=ModelConfig(num_layers=num_layers), moe=moe, parallel=parallel))
    by_rank = tuple(plans[rank::pp] for rank in range(pp))
    users = Counter(place.source for plan in plans for place in plan.layers)
    seen: dict[tuple, int] = {}
    for rank, chunks in enumerate(by_rank):
        kind = tuple((c.has_embedding, c.has_head, *map(_kind, c.layers)) for c in chunks)
        # Sets alike in everything but their number are used by as many layers here, and here alone or elsewhere as well.
        used = Counter(
            place.source for place in moe_places(chunks) if place.source and place.source.way in ("tied", "scaled")
        )
        sets = sorted((count, count == users[source], *_set_size(source, plans)) for source, count in used.items())
        seen.setdefault((kind, tuple(sets)), rank)
    return by_rank, tuple(seen.values())


def _set_size(source: Source | None, plans: Iterable[StagePlan]) -> tuple[int, ...]:
    return next((p.num_experts,) for plan in plans for p in plan.layers if p.source == source)
