"""The planner: the legal layouts of a model on a cluster, the memory and time of each, and the fastest.

It enumerates sizes (context, tensor, pipeline, virtual stages, expert, expert-tensor, micro-batch) and keeps those that
`config.validate` accepts. Within one choice of sizes, it tries options that trade memory for time (recomputation, when
the pool is combined) in the order of their cost, and keeps the first that fits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from megatron_samoe.config.checkpoint import CheckpointConfig
from megatron_samoe.config.cli import as_flags
from megatron_samoe.config.data import DataConfig
from megatron_samoe.config.derived import (
    data_parallel_size,
    divisors,
    global_batch_size,
    num_micro_batches,
    uneven_layout,
    virtual_stages,
)
from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.validate import refuse_unknown, validate
from megatron_samoe.errors import ConfigError, in_units
from megatron_samoe.planning.cluster import Cluster
from megatron_samoe.planning.layout_cost import Cost, step_cost
from megatron_samoe.planning.memory import RankMemory, largest_rank_memory
from megatron_samoe.planning.teacher import planned_teacher

#: More chunks than this on one rank send more often than they save.
MAX_CHUNKS = 8
#: Context parallelism is not tried where it would leave a rank fewer tokens of a sequence: short ones fit without.
LEAST_CONTEXT = 4096


@dataclass(frozen=True)
class PlannedLayout:
    """One legal layout with its memory and cost.

    Attributes:
        rank, memory: the rank that needs most memory, and its memory.
        cost: of one step.
    """

    config: PretrainConfig
    world_size: int
    rank: int
    memory: RankMemory
    cost: Cost

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step."""
        return global_batch_size(self.config, self.world_size) * self.config.model.seq_length

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the cluster per second."""
        return self.step_tokens / self.cost.step_s

    def name(self) -> str:
        """Returns the layout in a few letters: tp2sp pp4x2 ep8 etp1 dp16 mb1x32."""
        parallel = self.config.parallel
        chunks = virtual_stages(parallel, self.config.model.num_layers) // parallel.pipeline_model_parallel_size
        words = [f"tp{parallel.tensor_model_parallel_size}{'sp' if parallel.sequence_parallel else ''}"]
        words += [f"cp{parallel.context_parallel_size}"] if parallel.context_parallel_size > 1 else []
        words.append(f"pp{parallel.pipeline_model_parallel_size}{f'x{chunks}' if chunks > 1 else ''}")
        if self.config.moe.expert_layout != "dense":
            words.append(f"ep{parallel.expert_model_parallel_size}")
            if parallel.tensor_model_parallel_size > 1:
                words.append(f"etp{parallel.expert_tp}")
        words.append(f"dp{data_parallel_size(self.config, self.world_size)}")
        number = num_micro_batches(self.config, self.world_size)
        return " ".join([*words, f"mb{self.config.training.micro_batch_size}x{number}"])

    def options(self) -> str:
        """Returns the options other than sizes in a few words."""
        training, moe, parallel = self.config.training, self.config.moe, self.config.parallel
        words = ["zero"] if parallel.use_distributed_optimizer else []
        words += [f"cp {parallel.cp_comm_type}"] if parallel.context_parallel_size > 1 else []
        words += [f"recompute {training.recompute_granularity}"] if training.recompute_granularity else []
        words += [moe.samoe_combine] if moe.has_coefficients else []
        words += [moe.samoe_pool_placement] if moe.shares_experts else []
        return ", ".join(words)

    def flags(self) -> list[str]:
        """Returns the command-line flags of this layout for the pretrain program."""
        default = PretrainConfig()
        chosen: dict[str, Any] = {}
        for group, names in PLANNED_FIELDS.items():
            for name in names:
                value = getattr(getattr(self.config, group), name)
                if value != getattr(getattr(default, group), name):
                    chosen[name] = value
        return as_flags(chosen)


PLANNED_FIELDS = {
    "parallel": [f.name for f in fields(ParallelConfig) if not f.name.startswith("distributed")],
    "moe": ["samoe_combine", "samoe_pool_placement"],
    "training": ["micro_batch_size", "global_batch_size", "recompute_granularity", "recompute_num_layers"],
}


def plan_layouts(
    config: PretrainConfig, vocab_size: int, cluster: Cluster, micro_batch_sizes: Sequence[int] = ()
) -> list[PlannedLayout]:
    """Returns the layouts that fit, fastest first.

    Args:
        config: the model and batch. Layout options that differ from their defaults are kept.
        micro_batch_sizes: to choose from; the configured one if empty.

    Raises:
        ConfigError: no layout is legal, or none fits; the message names the smallest and the memory it lacks.
    """
    refuse_unknown(config, "planner", "the layout planner")
    kept = {name: getattr(config.data, name) for name in ("reset_position_ids", "reset_attention_mask")}
    base = replace(config, data=DataConfig(mock_data=True, **kept), checkpoint=CheckpointConfig())
    legal: list[PretrainConfig] = []
    problem = None
    for sized in _sizes(base, cluster, micro_batch_sizes or (config.training.micro_batch_size,)):
        try:
            validate(sized, cluster.world_size)
            planned_teacher(sized, vocab_size, cluster.world_size)
        except ConfigError as error:
            problem = problem or error
            continue
        legal += _with_pool_placements(sized, cluster)
    if not legal:
        raise problem or ConfigError("--world-size", cluster.world_size, "has no layout that fills it")
    fitting = [
        found for candidate in legal if (found := _fastest_that_fits(candidate, vocab_size, cluster)) is not None
    ]
    if not fitting:
        raise _too_large(_smallest(legal, vocab_size, cluster), cluster)
    return sorted(fitting, key=lambda layout: -layout.tokens_per_s)


def changes(layout: PlannedLayout, vocab_size: int, cluster: Cluster) -> Iterator[tuple[str, PlannedLayout]]:
    """Yields (words, layout) of every legal layout that differs in one choice, whether it fits or not."""
    config, world = layout.config, layout.world_size
    parallel, training = config.parallel, config.training
    micro, ep, tp = training.micro_batch_size, parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    recomputes: list[Any] = [kind for kind in (None, "selective", "full") if kind != training.recompute_granularity]
    tried = [(f"micro-batch {size}", {"micro_batch_size": size}) for size in (micro // 2, 2 * micro)]
    tried += [(f"recompute {kind or 'nothing'}", {"recompute_granularity": kind}) for kind in recomputes]
    tried += [(f"expert parallel {size}", {"expert_model_parallel_size": size}) for size in (ep // 2, 2 * ep)]
    tried += [(f"tensor parallel {size}", {"tensor_model_parallel_size": size}) for size in (tp // 2, 2 * tp)]
    for words, change in tried:
        group = "parallel" if next(iter(change)) in PLANNED_FIELDS["parallel"] else "training"
        changed = replace(config, **{group: replace(getattr(config, group), **change)})
        with suppress(ConfigError):
            validate(changed, world)
            yield words, _planned(changed, *largest_rank_memory(changed, vocab_size, world), vocab_size, cluster)


def _too_large(smallest: PlannedLayout, cluster: Cluster) -> ConfigError:
    need, parts = smallest.memory.total, smallest.memory.parts()
    largest = max(parts, key=lambda name: parts[name])
    return ConfigError(
        "--memory-gb",
        cluster.memory_bytes / 1e9,
        f"must be at least {math.ceil(need / 1e7) / 100} for any layout on {cluster.world_size} ranks: the smallest, "
        f"{smallest.name()} ({smallest.options() or 'no options'}), misses {in_units(need - cluster.memory_bytes, 'B')} "
        f"(most of it {largest}, {in_units(parts[largest], 'B')} on rank {smallest.rank}); add ranks or make the model smaller",
    )


def _sizes(base: PretrainConfig, cluster: Cluster, micro_batch_sizes: Sequence[int]) -> Iterator[PretrainConfig]:
    """Yields all choices of sizes that keep the user's fixed ones; most are legal."""
    given, world, moe = base.parallel, cluster.world_size, base.moe
    is_moe = moe.expert_layout != "dense"
    for cp, comm_type in _contexts(given, base.model.seq_length, world):
        per_part = max(world // cp, 1)
        fits_node = [
            d for d in divisors(per_part) if d <= cluster.gpus_per_node and base.model.num_attention_heads % d == 0
        ]
        for tp in _fixed(given, "tensor_model_parallel_size", fits_node):
            stages = [d for d in divisors(per_part // tp) if d <= base.model.num_layers] if per_part % tp == 0 else [1]
            for pp, etp in itertools.product(
                _fixed(given, "pipeline_model_parallel_size", stages),
                _fixed(given, "expert_tensor_parallel_size", sorted({1, tp})) if is_moe else [None],
            ):
                over = max(world // (pp * (etp or tp)), 1)
                experts = [d for d in divisors(math.gcd(*moe.expert_counts)) if over % d == 0] if is_moe else [1]
                for ep, (vpp, layout) in itertools.product(
                    _fixed(given, "expert_model_parallel_size", experts), _stage_cuts(base, pp)
                ):
                    parallel = replace(
                        given,
                        tensor_model_parallel_size=tp,
                        pipeline_model_parallel_size=pp,
                        context_parallel_size=cp,
                        cp_comm_type=comm_type,
                        expert_model_parallel_size=ep,
                        expert_tensor_parallel_size=etp if tp > 1 else None,
                        num_layers_per_virtual_pipeline_stage=vpp,
                        pipeline_model_parallel_layout=layout,
                        sequence_parallel=given.sequence_parallel or tp > 1,
                    )
                    for size in micro_batch_sizes:
                        yield replace(base, parallel=parallel, training=replace(base.training, micro_batch_size=size))


def _contexts(given: ParallelConfig, seq_length: int, world: int) -> Iterator[tuple[int, Any]]:
    """Yields context-parallel sizes with each way of exchange; none for one rank."""
    for cp in _fixed(given, "context_parallel_size", _context_sizes(seq_length, world)):
        ways = _fixed(given, "cp_comm_type", ["p2p", "a2a"]) if cp > 1 else [ParallelConfig().cp_comm_type]
        yield from ((cp, way) for way in ways)


def _context_sizes(seq_length: int, world: int) -> list[int]:
    """Returns the context-parallel sizes worth a look: powers of two that leave a rank LEAST_CONTEXT tokens of a sequence."""
    sizes = [d for d in divisors(world) if d.bit_count() == 1 and seq_length % (2 * d) == 0]
    return [1, *(d for d in sizes if d > 1 and seq_length // d >= LEAST_CONTEXT)]


def _fixed(given: ParallelConfig, name: str, choices: list) -> list:
    value = getattr(given, name)
    return choices if value == getattr(ParallelConfig(), name) else [value]


def _stage_cuts(base: PretrainConfig, pp: int) -> list[tuple[int | None, str | None]]:
    """Returns (layers per virtual stage, stage layout) pairs for `pp` stages."""
    given, layers = base.parallel, base.model.num_layers
    if given.num_layers_per_virtual_pipeline_stage is not None or given.pipeline_model_parallel_layout is not None:
        return [(given.num_layers_per_virtual_pipeline_stage, given.pipeline_model_parallel_layout)]
    if pp == 1:
        return [(None, None)]
    if layers % pp:
        return [(None, uneven_layout(layers, pp))]
    per_stage = layers // pp
    cuts: list[tuple[int | None, str | None]] = [(None, None)]
    if given.pipeline_schedule == "1f1b":
        cuts += [(d, None) for d in divisors(per_stage) if 1 < per_stage // d <= MAX_CHUNKS]
    return cuts


def _with_pool_placements(sized: PretrainConfig, cluster: Cluster) -> list[PretrainConfig]:
    """Returns a choice of sizes with what is always worth having, once for each placement of shared experts."""
    moe, parallel = sized.moe, sized.parallel
    is_replicated = data_parallel_size(sized, cluster.world_size) * parallel.context_parallel_size > 1
    parallel = replace(
        parallel,
        use_distributed_optimizer=parallel.use_distributed_optimizer or is_replicated,
        overlap_grad_reduce=parallel.overlap_grad_reduce or is_replicated,
    )
    sized = replace(sized, parallel=parallel)
    holders = cluster.world_size // (parallel.expert_tp * parallel.expert_model_parallel_size)
    if not moe.shares_experts or holders == 1 or moe.samoe_pool_placement != "sharded":
        return [sized]
    return [sized, replace(sized, moe=replace(moe, samoe_pool_placement="replicated"))]


def _fastest_that_fits(candidate: PretrainConfig, vocab_size: int, cluster: Cluster) -> PlannedLayout | None:
    """Returns the layout with the cheapest options that fit; None where none do."""
    ruled_out = None
    for config in _memory_savings(candidate):
        if config.moe.samoe_combine == ruled_out:
            continue
        rank, memory = largest_rank_memory(config, vocab_size, cluster.world_size, cluster.memory_bytes)
        if memory.total <= cluster.memory_bytes:
            return _planned(config, rank, memory, vocab_size, cluster)
        if memory.weights + memory.gradients + memory.optimizer > cluster.memory_bytes:
            return None  # no option makes these smaller
        if memory.resident > cluster.memory_bytes:
            ruled_out = config.moe.samoe_combine  # whatever is recomputed
    return None


def _smallest(legal: list[PretrainConfig], vocab_size: int, cluster: Cluster) -> PlannedLayout:
    """Returns the layout whose largest rank needs least memory."""
    configs = (config for candidate in legal for config in _memory_savings(candidate))
    found = ((config, *largest_rank_memory(config, vocab_size, cluster.world_size)) for config in configs)
    config, rank, memory = min(found, key=lambda layout: layout[2].total)
    return _planned(config, rank, memory, vocab_size, cluster)


def _planned(config: PretrainConfig, rank: int, memory: RankMemory, vocab_size: int, cluster: Cluster) -> PlannedLayout:
    return PlannedLayout(config, cluster.world_size, rank, memory, step_cost(config, vocab_size, cluster))


def _memory_savings(candidate: PretrainConfig) -> Iterator[PretrainConfig]:
    """Yields a layout with the options that trade memory for time, from the fastest to the smallest."""
    moe, training = candidate.moe, candidate.training
    combines: list[Literal["step", "layer"]] = [moe.samoe_combine]
    if moe.has_coefficients and moe.samoe_combine == "step":
        combines = ["step", "layer"]
    recomputes: list[Any] = [training.recompute_granularity]
    if training.recompute_granularity is None:
        recomputes = [None, "selective", "full"]
    for combine in combines:
        for recompute in recomputes:
            yield replace(
                candidate,
                moe=replace(moe, samoe_combine=combine),
                training=replace(training, recompute_granularity=recompute),
            )
