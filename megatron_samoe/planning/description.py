"""The parameters of each rank's model, read from one layer of each kind on "meta", for worlds of any size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from torch import nn

from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import ExpertSource, Way
from megatron_samoe.config.training import TrainingConfig
from megatron_samoe.models.blueprint import Blueprint
from megatron_samoe.models.gpt_stage import GPTStage
from megatron_samoe.models.layer_layout import LayerSpec, StagePlan
from megatron_samoe.models.rank_model import compute_dtype
from megatron_samoe.models.transformer_layer import TransformerLayer
from megatron_samoe.moe.sharing.way import LenderCosts, SharingContext, SharingWay
from megatron_samoe.parallel_state.parameter_tag import ParameterTag, tag_of
from megatron_samoe.parallel_state.rank_grid import RankGrid
from megatron_samoe.parallel_state.state import ParallelState, planned_state
from megatron_samoe.planning.recorder import storageless
from megatron_samoe.planning.stages import StageContent, Users, kind_of, stages_of
from megatron_samoe.planning.traces import Trace, trace_head, trace_layer


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
    def shard_numel(self) -> int:
        """Elements of the rank's full shard, also where it holds only a slice of it."""
        return self.numel if self.tag.slice is None else math.prod(self.tag.slice.shape)


class Description:
    """A model's modules as the ranks of a layout hold them, without storage. Each layout has one (`_describe`).

    Args:
        dense: that of a layout that has the same layers without experts, and the same ends.
    """

    def __init__(self, config: PretrainConfig, vocab_size: int, state: ParallelState, dense: Description | None):
        moe = replace(config.moe, moe_scale_output_init=False)  # first values do not matter here
        self._blueprint = Blueprint(replace(config, moe=moe), vocab_size, state, compute_dtype(config))
        self._dense = dense or self
        self._layers: dict[tuple, TransformerLayer] = {}
        self._traces: dict[tuple, Trace] = {}
        self._own_of_way: dict[Way, nn.Module] = {}
        self._ends: dict[tuple[bool, bool], GPTStage] = {}
        self._known: dict[int, tuple[DescribedParameter, ...]] = {}
        self._of_stage: dict[StageContent, tuple[DescribedParameter, ...]] = {}

    def layer(self, spec: LayerSpec, selective: bool = False) -> TransformerLayer:
        """Returns a layer like the one at a position; each number of experts and way of sharing has one.

        Args:
            selective: whether the layer recomputes attention's core, which changes nothing but what it keeps.
        """
        if not spec.num_experts and self._dense is not self:
            return self._dense.layer(spec, selective)
        key = (kind_of(spec), selective)
        if key not in self._layers:
            training = replace(
                self._blueprint.config.training, recompute_granularity="selective" if selective else None
            )
            blueprint = replace(self._blueprint, config=replace(self._blueprint.config, training=training))
            self._layers[key] = TransformerLayer(blueprint, spec)
        return self._layers[key]

    def trace(self, spec: LayerSpec, batch: int, selective: bool = False, worst: bool = False) -> Trace:
        """Returns the trace of such a layer for a micro-batch of sequences.

        Args:
            worst: let tokens visit the number of experts of a run's worst time, not of the average.
        """
        if not spec.num_experts and self._dense is not self:
            return self._dense.trace(spec, batch, selective)
        layer = self.layer(spec, selective)
        router = layer.moe.router if layer.is_moe else None
        visited = 0.0 if router is None else router.kept_choices[0] if worst else router.experts_per_token
        key = (kind_of(spec), batch, selective, visited)
        if key not in self._traces:
            self._traces[key] = trace_layer(layer, self._blueprint.config.model, batch, visited)
        return self._traces[key]

    def head_trace(self, batch: int, fuses_loss: bool) -> Trace:
        """Returns the trace of the output layer and the loss; see `traces.trace_head`."""
        key, traces = (batch, fuses_loss), self._dense._traces
        if key not in traces:
            head = self.ends(StagePlan((), has_embedding=False, has_head=True))
            traces[key] = trace_head(head, batch, fuses_loss)
        return traces[key]

    def ends(self, plan: StagePlan) -> GPTStage:
        """Returns a stage with the same ends and no layer."""
        key = (plan.has_embedding, plan.has_head)
        if key not in self._ends:
            self._ends[key] = GPTStage(self._blueprint, StagePlan((), *key))
        return self._ends[key]

    def shared(self, users: Users, state: ParallelState, placement: Literal["sharded", "replicated"]) -> SharedExperts:
        """Returns the experts that MoE layers share on a rank of any world."""
        context = self._blueprint.sharing_context
        using: dict[ExpertSource, list[int]] = {}
        for moe_index, source in enumerate(context.sources):
            using.setdefault(source, []).append(moe_index)
        # Only how many layers of a stage use a source matters, not which: each stage takes the next ones.
        layers = []
        for used in users.of_stage:
            layers.append(tuple(i for source, number in used for i in using[source][:number]))
            for source, number in used:
                using[source] = using[source][number:]
        config = replace(context.config, samoe_pool_placement=placement)
        context = replace(context, config=config, state=state, layers_of_stage=tuple(layers))
        own = {moe_index: self._own(moe_index) for moe_index in layers[state.pp.rank]}
        return SharedExperts(self._blueprint.parts.sharing, context, own)

    def parameters(self, content: StageContent) -> tuple[DescribedParameter, ...]:
        """Returns the parameters of a rank whose stage has this content, except experts that MoE layers share."""
        if content not in self._of_stage:
            found = [p for ends in content.ends for p in self._described(self.ends(StagePlan((), *ends)))]
            for spec, count in content.layers:
                found += [replace(p, numel=count * p.numel) for p in self._described(self.layer(spec))]
            self._of_stage[content] = tuple(found)
        return self._of_stage[content]

    def _own(self, moe_index: int) -> nn.Module:
        """Returns what a layer like an MoE layer owns of its experts."""
        kind = self._blueprint.sharing_context.sources[moe_index].way
        if kind not in self._own_of_way:
            self._own_of_way[kind] = self._blueprint.sharing.layer_part(moe_index)
        return self._own_of_way[kind]

    def _described(self, module: nn.Module) -> tuple[DescribedParameter, ...]:
        if id(module) not in self._known:
            self._known[id(module)] = _described(module)
        return self._known[id(module)]


class SharedExperts:
    """The experts that MoE layers share on one rank, whatever --samoe-combine says, and the cost of lending them there.

    Args:
        own: what each of the rank's MoE layers owns of its experts.
    """

    def __init__(
        self, sharing: Callable[[SharingContext], SharingWay], context: SharingContext, own: Mapping[int, nn.Module]
    ):
        self._sharing, self._context, self._own = sharing, context, own
        self._part = sharing(context).shared_part()
        self.parameters = () if self._part is None else _described(self._part)
        self._costs: dict[str, LenderCosts] = {}

    def costs(self, combine: Literal["step", "layer"]) -> LenderCosts:
        """Returns the cost of lending with a value of --samoe-combine."""
        if self._part is None:
            return LenderCosts()
        if combine not in self._costs:
            way = self._sharing(replace(self._context, config=replace(self._context.config, samoe_combine=combine)))
            self._costs[combine] = way.lender(self._own, self._part).costs()
        return self._costs[combine]


def _described(module: nn.Module) -> tuple[DescribedParameter, ...]:
    """Returns a module's parameters; those that are sharded and reduced equally count as one."""
    of_kind: dict[tuple, DescribedParameter] = {}
    for number, p in enumerate(module.parameters()):
        tag, numel = tag_of(p), p.numel()
        key: tuple = (tag.gradient_group, p.element_size(), p.requires_grad, tag.is_routed_expert)
        if tag.shard.family == "pool":
            key = (number,)  # exchanged one by one
        before = of_kind.get(key)
        total, largest = (before.numel, before.largest) if before is not None else (0, 0)
        of_kind[key] = DescribedParameter(tag, total + numel, max(largest, numel), p.element_size(), p.requires_grad)
    return tuple(of_kind.values())


class PlannedModel:
    """A model in a layout, for a world that need not exist.

    Args:
        vocab_size: number of tokens, before padding.

    Raises:
        ValueError: the layout does not fill the world.
    """

    def __init__(self, config: PretrainConfig, vocab_size: int, world_size: int):
        layout, grid = config.parallel, RankGrid.of(config.parallel, world_size)
        self.config, self.grid = config, grid
        # Layouts that differ in other things share what was counted. Groups of sequences exchange a few numbers only.
        counted = PretrainConfig(
            model=config.model,
            moe=replace(
                config.moe,
                moe_aux_loss_group_size=None,
                pool_lock_entropy_group_size=None,
                samoe_combine="step",
                samoe_pool_placement="sharded",
            ),
            training=TrainingConfig(bf16=config.training.bf16 or config.training.fp16),
        )
        experts = ParallelConfig(expert_model_parallel_size=grid.ep, expert_tensor_parallel_size=grid.etp)
        sizes = replace(
            experts,
            tensor_model_parallel_size=grid.tp,
            sequence_parallel=layout.sequence_parallel and grid.tp > 1,
            context_parallel_size=grid.cp,
            cp_comm_type=layout.cp_comm_type,
        )
        self.description = _describe(replace(counted, parallel=sizes), vocab_size)
        # What is shared is the same for every tensor- and context-parallel size.
        self._lending_grid = replace(grid, tp=1, cp=1)
        is_lending = grid == self._lending_grid
        self._lending = self.description if is_lending else _describe(replace(counted, parallel=experts), vocab_size)
        cuts = ParallelConfig(
            pipeline_model_parallel_size=grid.pp,
            num_layers_per_virtual_pipeline_stage=layout.num_layers_per_virtual_pipeline_stage,
            pipeline_model_parallel_layout=layout.pipeline_model_parallel_layout,
        )
        self.stages = stages_of(replace(counted, parallel=cuts))
        self._shared: dict[int, SharedExperts] = {}

    def stage_of(self, rank: int) -> int:
        """Returns the pipeline rank of a rank."""
        return rank // (self.grid.world_size // self.grid.pp)

    def first_rank_of(self, stage: int) -> int:
        """Returns the first rank of a pipeline rank's stage."""
        return stage * (self.grid.world_size // self.grid.pp)

    def parameters(self, rank: int) -> list[DescribedParameter]:
        """Returns all parameters of a rank."""
        own = self.description.parameters(self.stages.contents[self.stage_of(rank)])
        return [*own, *self.shared(rank).parameters]

    def shared(self, rank: int) -> SharedExperts:
        """Returns the experts that MoE layers share on a rank."""
        if rank not in self._shared:
            placement = self.config.moe.samoe_pool_placement
            self._shared[rank] = _shared(self._lending, self._lending_grid, rank, self.stages.users, placement)
        return self._shared[rank]

    def lending_costs(self, rank: int) -> LenderCosts:
        """Returns the cost of lending these experts there."""
        return self.shared(rank).costs(self.config.moe.samoe_combine)

    def layers(self) -> Iterator[LayerSpec]:
        """Yields all layers, stage by stage."""
        for chunks in self.stages.chunks_of_stage:
            for plan in chunks:
                yield from plan.layers


def unsharded_model(config: PretrainConfig, vocab_size: int) -> PlannedModel:
    """Returns the planned model of one process."""
    return PlannedModel(replace(config, parallel=ParallelConfig()), vocab_size, 1)


@lru_cache(maxsize=1024)
def _describe(config: PretrainConfig, vocab_size: int) -> Description:
    layout = config.parallel
    tp, ep, etp = layout.tensor_model_parallel_size, layout.expert_model_parallel_size, layout.expert_tp
    dense = None
    if (ep, etp) != (1, tp):
        unsplit = replace(layout, expert_model_parallel_size=1, expert_tensor_parallel_size=tp)
        dense = _describe(replace(config, parallel=unsplit), vocab_size)
    grid = RankGrid.of(layout, math.lcm(tp * layout.context_parallel_size, etp * ep))
    state = planned_state(grid, 0, layout.sequence_parallel, layout.cp_comm_type)
    return Description(config, vocab_size, storageless(state), dense)


@lru_cache(maxsize=4096)
def _shared(
    description: Description, grid: RankGrid, rank: int, users: Users, placement: Literal["sharded", "replicated"]
) -> SharedExperts:
    return description.shared(users, planned_state(grid, rank), placement)
