"""Bytes that each rank holds while it trains, by part; tests compare them with built models.

Weights, gradients and optimizer state are exact, because they follow from the same tags as the buffers (which ranks sum
a gradient, which dims are split). Activations are counted from what autograd keeps of the layers, with evenly loaded
experts and attention that does not keep its probabilities.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megatron_samoe.config.derived import num_micro_batches
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.distributed.grad_buffer import DEFAULT_BUCKET_SIZE
from megatron_samoe.parallel_state.rank_grid import RankGrid
from megatron_samoe.planning.activation_memory import activation_bytes
from megatron_samoe.planning.description import (
    DescribedParameter,
    Description,
    PlannedModel,
    SharedExperts,
)
from megatron_samoe.planning.muon import Matrices, matrices_of
from megatron_samoe.planning.stages import StageContent
from megatron_samoe.planning.teacher import kept_bytes, planned_teacher, weight_bytes

FP32_BYTES = 4
#: AdamW's two moments in fp32; Muon has one.
MOMENT_BYTES = 8


@dataclass(frozen=True)
class RankMemory:
    """The memory of one rank, in bytes.

    Attributes:
        weights, gradients: the model's own, gradients in fp32.
        optimizer: fp32 master weights (where the weights are not fp32) and two moments, of Muon's matrices one.
        folded_weights, folded_gradients: experts that lenders keep from step to step: those that --samoe-combine step
            keeps combined, for all layers of this rank, and the unsharded tied sets that its layers use.
        gathered_banks: unsharded banks and their gradients that --samoe-combine layer holds through a step where the pool is
            sharded.
        activations: kept for backward passes at the schedule's peak, with the largest layer's workspace.
        exchange: the largest temporary of gathering and reducing, at the beginning or end of a step, when no
            activations exist.
        expert: the part of weights, gradients, optimizer and folded experts that belongs to routed experts.
        teacher: weights of a teacher with its folded experts, its logits with the gradient of their divergence, and its
            activations in messages between stages; nothing else is kept of it.
    """

    weights: int
    gradients: int
    optimizer: int
    folded_weights: int
    folded_gradients: int
    gathered_banks: int
    activations: int
    exchange: int
    expert: int
    teacher: int = 0

    @property
    def resident(self) -> int:
        """Bytes that stay from step to step."""
        folded = self.folded_weights + self.folded_gradients
        return self.weights + self.gradients + self.optimizer + folded + self.teacher

    @property
    def total(self) -> int:
        """Bytes at the peak of a step."""
        return self.resident + max(self.gathered_banks + self.activations, self.exchange)

    def parts(self) -> dict[str, int]:
        """Returns the bytes of all parts by name, in the order of a step. `activations` and `exchange` never coincide."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "folded experts": self.folded_weights + self.folded_gradients,
            "gathered banks": self.gathered_banks,
            "activations": self.activations,
            "exchange": self.exchange,
            **({"teacher": self.teacher} if self.teacher else {}),
        }


def rank_memory(config: PretrainConfig, vocab_size: int, world_size: int, rank: int = 0) -> RankMemory:
    """Returns the memory of one rank, for a legal configuration.

    Args:
        vocab_size: number of tokens, before padding.
    """
    planned = PlannedModel(config, vocab_size, world_size)
    return _rank_memory(planned, planned_teacher(config, vocab_size, world_size), rank)


def largest_rank_memory(
    config: PretrainConfig, vocab_size: int, world_size: int, limit: float = math.inf
) -> tuple[int, RankMemory]:
    """Returns the rank that needs most memory, and its memory.

    Of stages with the same layers the first has the most passes in flight, and of a stage's ranks the first holds the
    longest slices. So few ranks are computed.

    Args:
        limit: bytes; the first rank found to need more is returned, and the others are not computed.
    """
    planned = PlannedModel(config, vocab_size, world_size)
    ranks = [planned.first_rank_of(stage) for stage in planned.stages.distinct]
    teacher = planned_teacher(config, vocab_size, world_size)
    if teacher is not None:  # its layers are spread in their own way
        ranks = sorted({*ranks, *(teacher.first_rank_of(stage) for stage in teacher.stages.distinct)})
    found: list[tuple[int, RankMemory]] = []
    for rank in ranks:
        found.append((rank, _rank_memory(planned, teacher, rank)))
        if found[-1][1].total > limit:
            return found[-1]
    return max(found, key=lambda p: p[1].total)


def _rank_memory(planned: PlannedModel, teacher: PlannedModel | None, rank: int) -> RankMemory:
    config, stage = planned.config, planned.stage_of(rank)
    layout, costs = config.parallel, planned.lending_costs(rank)
    bucket = layout.ddp_bucket_size or DEFAULT_BUCKET_SIZE
    held = _held_by_rank(
        planned.description,
        planned.grid,
        rank,
        planned.stages.contents[stage],
        planned.shared(rank),
        layout.use_distributed_optimizer,
        bucket,
        matrices_of(planned, rank),
    )
    return RankMemory(
        held.weights,
        held.gradients,
        held.optimizer,
        costs.weights,
        costs.gradients,
        costs.gathered,
        activation_bytes(planned, stage, num_micro_batches(config, planned.grid.world_size)),
        max(held.exchange, costs.exchange),
        held.expert + costs.weights + costs.gradients,
        0 if teacher is None else weight_bytes(teacher, rank) + kept_bytes(teacher, stage),
    )


@lru_cache(maxsize=1 << 14)
def _held_by_rank(
    description: Description,
    grid: RankGrid,
    rank: int,
    content: StageContent,
    shared: SharedExperts,
    zero: bool,
    bucket: int,
    matrices: tuple[Matrices, ...],
) -> _Held:
    """Returns the bytes of all gradient buffers summed, and of the largest exchange."""
    found = [*description.parameters(content), *shared.parameters]
    by_muon: Counter[tuple] = Counter()
    for m in matrices:
        by_muon[m.tag.gradient_group, m.element_bytes, m.tag if m.tag.slice is not None else None] += m.numel
    parts = [
        _held(buffer, grid.size_and_rank(buffer[0].tag.gradient_group, rank), zero, bucket, by_muon)
        for buffer in _buffers(found)
    ]
    total = _Held(*map(sum, zip(_Held(0), *parts, strict=True)))
    return total._replace(exchange=max((p.exchange for p in parts), default=0))


class _Held(NamedTuple):
    weights: int
    gradients: int = 0
    optimizer: int = 0
    exchange: int = 0
    expert: int = 0


def _buffers(parameters: Iterable[DescribedParameter]) -> list[list[DescribedParameter]]:
    """Returns the parameters of each gradient buffer; frozen parameters and sharded banks are buffers of their own."""
    buffers: dict[tuple, list[DescribedParameter]] = {}
    for number, p in enumerate(parameters):
        is_separate = p.tag.slice is not None or not p.is_trained
        buffers.setdefault((number,) if is_separate else (p.tag.gradient_group, p.element_bytes), []).append(p)
    return list(buffers.values())


def _held(
    buffer: list[DescribedParameter],
    size_and_rank: tuple[int, int],
    zero: bool,
    bucket: int,
    matrices: Mapping[tuple, int],
) -> _Held:
    """Returns the bytes of one gradient buffer's parameters, with the largest temporary of its exchange.

    Args:
        size_and_rank: size of the group that sums the gradients, and the rank's number in it.
        zero: whether each of the group's ranks updates a slice of the buffer.
        matrices: elements that Muon updates, by gradient group, element size and, of a slice, its tag. A rank's slice of a
            buffer counts the buffer's share of them on average.
    """
    first, own, size = buffer[0], sum(p.numel for p in buffer), size_and_rank[0]
    element, exchange = first.element_bytes, 0
    weights, gradients = own * element, own * FP32_BYTES
    if not first.is_trained:
        return _Held(weights)
    if first.tag.slice is None and zero and size > 1:
        shard = -(-own // size)
        weights, gradients = shard * size * element, shard * size * FP32_BYTES
        # Of one buffer the reduced slice; the updated one comes later and takes at most as much.
        part = min(1.0, max(bucket, *(p.largest for p in buffer)) / max(own, 1))
        exchange = int(part * shard * FP32_BYTES)
        own = max(0, min(shard, own - shard * size_and_rank[1]))
    key = (first.tag.gradient_group, element, first.tag if first.tag.slice is not None else None)
    by_muon = own * min(matrices.get(key, 0) / max(sum(p.numel for p in buffer), 1), 1.0)
    optimizer = own * (MOMENT_BYTES + (FP32_BYTES if element < FP32_BYTES else 0)) - round(by_muon) * FP32_BYTES
    share = sum(p.numel for p in buffer if p.tag.is_routed_expert) / max(sum(p.numel for p in buffer), 1)
    return _Held(weights, gradients, optimizer, exchange, round(share * (weights + gradients + optimizer)))
