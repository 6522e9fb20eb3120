"""The effect of --optimizer muon on a rank: the elements of its matrices, and the operations that make them orthogonal.

Who asks: `memory` counts one fp32 moment, not two, for these elements, `layout_cost` the time and the exchanges.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from megatron_samoe.config.training import OptimizerConfig
from megatron_samoe.moe.experts import ExpertShape
from megatron_samoe.optimizer.muon import newton_schulz_flops
from megatron_samoe.optimizer.param_groups import FUSED_QKV, MATRICES
from megatron_samoe.optimizer.whole_tensors import Shard
from megatron_samoe.parallel_state.parameter_tag import ParameterTag, shard_shape, tag_of
from megatron_samoe.parallel_state.rank_grid import RankGrid
from megatron_samoe.planning.description import DescribedParameter, Description, PlannedModel
from megatron_samoe.planning.stages import StageContent


@dataclass(frozen=True)
class Matrices:
    """Matrices of a rank that are sharded and summed equally.

    Attributes:
        numel: elements of this rank's shards.
        num_tensors: how many there are, of experts those of this rank's expert-parallel number.
        step_flops: multiply-adds x 2 of one Newton-Schulz step of all of them, unsharded.
        split: the axis over which each is split, if it is.
    """

    tag: ParameterTag
    element_bytes: int
    numel: int
    num_tensors: int
    step_flops: float
    split: str | None

    def largest_share(self, grid: RankGrid, rank: int) -> float:
        """Returns the share of the work that the busiest rank has: full tensors, so owners beyond their number have none."""
        most = self.num_tensors
        for axis in (self.tag.gradient_group, *((self.split,) if self.split else ())):
            most = -(-most // grid.size_and_rank(axis, rank)[0])
        return most / self.num_tensors


def matrices_of(planned: PlannedModel, rank: int) -> tuple[Matrices, ...]:
    """Returns a rank's matrices, those of experts that layers share included; () without Muon."""
    if planned.config.optimizer.optimizer != "muon":
        return ()
    shared = planned.shared(rank).parameters
    shapes = (planned.description.layer(spec).moe.shape for spec in planned.layers() if spec.num_experts)
    of_shared = tuple(_of_shared(shared, next(shapes), planned.grid.etp)) if shared else ()
    return _own(planned.description, planned.grid, rank, planned.stages.contents[planned.stage_of(rank)]) + of_shared


@lru_cache(maxsize=1024)
def _own(description: Description, grid: RankGrid, rank: int, content: StageContent) -> tuple[Matrices, ...]:
    layers = ((description.layer(spec), count) for spec, count in content.layers)
    return tuple(m for layer, count in layers for m in _of_module(layer, grid, rank, count))


def _of_module(module: nn.Module, grid: RankGrid, rank: int, count: int) -> Iterator[Matrices]:
    for name, p in module.named_parameters():
        if not any(pattern.search(f"layers.0.{name}") for pattern in (MATRICES, FUSED_QKV)):
            continue
        shard = Shard(tag_of(p), shard_shape(p), p)
        sizes = list(shard.shape[shard.num_stacked :])
        if shard.split is not None:
            sizes[shard.split[0]] *= grid.size_and_rank(shard.split[1], rank)[0]
        number, axis = count * shard.num_tensors, None if shard.split is None else shard.split[1]
        flops = number * newton_schulz_flops(math.prod(sizes[:-1]), sizes[-1], 1)
        yield Matrices(shard.tag, p.element_size(), count * math.prod(shard.shape), number, flops, axis)


def _of_shared(shared: Iterable[DescribedParameter], shape: ExpertShape, etp: int) -> Iterator[Matrices]:
    """Yields the matrices of banks and sets, of which biases make up the rest."""
    rows, hidden = shape.matrix_rows - shape.hidden_size, shape.hidden_size
    ups = newton_schulz_flops(rows, hidden, 1)
    per_element = (ups + newton_schulz_flops(hidden, shape.ffn_size, 1)) / shape.matrix_elements
    for p in shared:
        if p.tag.shard.family == "pool":
            share = 1.0 if p.tag.init.kind == "normal" else 0.0
        elif p.tag.gradient_group == "edp":
            share = shape.matrix_elements / (shape.matrix_elements + (rows if shape.bias else 0))
        else:
            share = 0.0
        if share and p.tag.is_routed_expert:
            elements = share * p.shard_numel
            number = max(round(2 * etp * elements / shape.matrix_elements), 1)
            yield Matrices(p.tag, p.element_bytes, round(share * p.numel), number, etp * elements * per_element, "etp")


def flops_of_rank(matrices: Iterable[Matrices], config: OptimizerConfig, grid: RankGrid, rank: int) -> float:
    """Returns multiply-adds x 2 of a step's Newton-Schulz products on the busiest of the ranks that share them."""
    return sum(config.muon_num_ns_steps * m.step_flops * m.largest_share(grid, rank) for m in matrices)
