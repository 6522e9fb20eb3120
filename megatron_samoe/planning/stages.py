"""The layers of pipeline ranks, one rank for all that hold equal layers, so that a plan computes each only once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.sharing_map import ExpertSource
from megatron_samoe.models.layer_layout import LayerSpec, StagePlan, stage_plans

Chunks = tuple[StagePlan, ...]


def kind_of(spec: LayerSpec) -> tuple:
    """Returns the key of layers with the same parameters."""
    return spec.num_experts, spec.source and spec.source.way, spec.window


@dataclass(frozen=True, eq=False)
class StageContent:
    """The ends of a pipeline rank's chunks, and a layer of each kind with the number of such layers.

    Ranks with equal content have the same object, which is therefore cheap to look up.
    """

    ends: tuple[tuple[bool, bool], ...]
    layers: tuple[tuple[LayerSpec, int], ...]


@dataclass(frozen=True, eq=False)
class Stages:
    """The layers of all pipeline ranks.

    Attributes:
        chunks_of_stage: chunks of every pipeline rank.
        distinct: the lowest pipeline rank of each kind; ranks of a kind hold equally many layers of the same kinds, and the
            same ends.
        contents: of every pipeline rank.
    """

    chunks_of_stage: tuple[Chunks, ...]
    distinct: tuple[int, ...]
    contents: tuple[StageContent, ...]
    users: Users

    @lru_cache(maxsize=1 << 14)  # noqa: B019  stages live as long, in a cache of their own
    def counts(self, stage: int, recomputed: int) -> tuple[tuple[LayerSpec, bool, int], ...]:
        """Returns a layer of each kind of a stage, whether it is recomputed, and the number of such layers.

        Args:
            recomputed: how many layers of each chunk are recomputed, at most.
        """
        kinds: dict[tuple[tuple, bool], list[LayerSpec]] = {}
        for plan in self.chunks_of_stage[stage]:
            for number, spec in enumerate(plan.layers):
                kinds.setdefault((kind_of(spec), number < recomputed), []).append(spec)
        return tuple((specs[-1], again, len(specs)) for (_, again), specs in kinds.items())


@dataclass(frozen=True, eq=False)
class Users:
    """How many MoE layers of each pipeline rank use each source whose experts are shared.

    Stages cut in any way with equal numbers have the same object.
    """

    of_stage: tuple[tuple[tuple[ExpertSource, int], ...], ...]


@lru_cache(maxsize=1024)
def stages_of(config: PretrainConfig) -> Stages:
    """Returns the layers of a configuration's pipeline ranks, and which ranks are equal. Equal contents are one object."""
    plans, pp = stage_plans(config), config.parallel.pipeline_model_parallel_size
    by_rank = tuple(plans[rank::pp] for rank in range(pp))
    specs = [spec for plan in plans for spec in plan.layers]
    first_of_kind = {kind_of(spec): spec for spec in reversed(specs)}
    contents, uses_of_rank = [], []
    for chunks in by_rank:
        kinds = Counter(kind_of(spec) for plan in chunks for spec in plan.layers)
        ends = tuple((plan.has_embedding, plan.has_head) for plan in chunks)
        contents.append(_content(ends, tuple((first_of_kind[kind], n) for kind, n in kinds.items())))
        sources = (spec.source for plan in chunks for spec in plan.layers)
        uses_of_rank.append(Counter(source for source in sources if source is not None and source.way.is_shared))
    uses_of_all = sum(uses_of_rank, Counter[ExpertSource]())
    num_experts = {spec.source: spec.num_experts for spec in specs}
    first_rank: dict[tuple, int] = {}
    for rank, (chunks, uses) in enumerate(zip(by_rank, uses_of_rank, strict=True)):
        layers = tuple((c.has_embedding, c.has_head, *map(kind_of, c.layers)) for c in chunks)
        # Sets that differ only in their number are used by equally many layers here, and only here or elsewhere as well.
        sets = sorted(
            (count, count == uses_of_all[source], num_experts[source])
            for source, count in uses.items()
            if source.way.in_sets
        )
        first_rank.setdefault((layers, tuple(sets)), rank)
    users = _users(tuple(tuple(sorted(uses.items(), key=str)) for uses in uses_of_rank))
    return Stages(by_rank, tuple(first_rank.values()), tuple(contents), users)


@lru_cache(maxsize=1 << 14)
def _content(ends: tuple[tuple[bool, bool], ...], layers: tuple[tuple[LayerSpec, int], ...]) -> StageContent:
    return StageContent(ends, layers)


@lru_cache(maxsize=1 << 14)
def _users(of_stage: tuple[tuple[tuple[ExpertSource, int], ...], ...]) -> Users:
    return Users(of_stage)
