"""Bytes that each rank holds while it trains, by part; checked against built models.

Weights, gradients and optimizer state are exact: they follow from the same tags as the buffers themselves (which ranks
sum a gradient, which dims are split). Activations are counted from what autograd keeps of the layers, with evenly loaded
experts and attention that does not keep its probabilities.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from megatron_samoe.config.derived import num_micro_batches
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.distributed.grad_buffer import DEFAULT_BUCKET_SIZE
from megatron_samoe.models.rank_model import compute_dtype
from megatron_samoe.moe.sharing.bank_exchange import exchange_saves
from megatron_samoe.parallel_state.rank_grid import RankGrid
from megatron_samoe.planning.activation_memory import activation_bytes
from megatron_samoe.planning.description import Chunks, DescribedParameter, Description, PlannedModel

FP32_BYTES = 4
#: AdamW's two moments in fp32.
MOMENT_BYTES = 8


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank.

    Attributes:
        weights, gradients: the model's own, gradients in fp32.
        optimizer: fp32 master weights (where the weights are no fp32 themselves) and two moments.
        folded_weights, folded_gradients: experts that --samoe-combine step keeps combined, all layers of this rank.
        gathered_banks: whole banks and their gradients that --samoe-combine layer holds through a step where the pool is
            sharded.
        activations: kept for backward passes at the schedule's peak, with the largest layer's workspace.
        exchange: largest temporary of gathering and reducing, at the beginning or end of a step, when no activations
            exist.
        expert: the part of weights, gradients, optimizer and folded experts that belongs to routed experts.
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

    @property
    def resident(self) -> int:
        """What stays from step to step."""
        return self.weights + self.gradients + self.optimizer + self.folded_weights + self.folded_gradients

    @property
    def total(self) -> int:
        """The peak of a step."""
        return self.resident + max(self.gathered_banks + self.activations, self.exchange)

    def parts(self) -> dict[str, int]:
        """Returns the parts by name, in the order of a step; the two that never coincide are both there."""
        return {
            "weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer,
            "folded experts": self.folded_weights + self.folded_gradients, "gathered banks": self.gathered_banks,
            "activations": self.activations, "exchange": self.exchange,
        }  # fmt: skip


def rank_memory(config: PretrainConfig, vocab_size: int, world_size: int, rank: int = 0) -> RankMemory:
    """Returns what one rank holds, for a configuration that keeps the rules.

    Args:
        vocab_size: tokens that exist, before padding.
    """
    return _rank_memory(PlannedModel(config, vocab_size, world_size), rank)


def largest_rank_memory(config: PretrainConfig, vocab_size: int, world_size: int) -> tuple[int, RankMemory]:
    """Returns the rank that needs most, and what it needs.

    Of stages that hold alike the first holds the most passes in flight, and of a stage's ranks the first the longest slices,
    so few ranks are looked at.
    """
    planned = PlannedModel(config, vocab_size, world_size)
    ranks = [stage * (world_size // planned.grid.pp) for stage in planned.distinct_stages]
    return max(((rank, _rank_memory(planned, rank)) for rank in ranks), key=lambda p: p[1].total)


def _rank_memory(planned: PlannedModel, rank: int) -> RankMemory:
    config, stage = planned.config, planned.stage_of(rank)
    layout, banks = config.parallel, planned.shared_parameters(rank)
    bucket = layout.ddp_bucket_size or DEFAULT_BUCKET_SIZE
    held = _held_by_rank(
        planned.description, planned.grid, rank, planned.chunks_of_stage[stage], banks,
        layout.use_distributed_optimizer, bucket,
    )  # fmt: skip
    gathered, bank_exchange = _whole_banks(planned, [p for p in banks if p.tag.slice is not None], stage)
    folded = 0
    if config.moe.has_pool and config.moe.samoe_combine == "step":
        folded = planned.moe_layers(stage) * sum(p.whole_numel for p in banks) // config.moe.num_expert_banks
    folded_weights, folded_gradients = folded * compute_dtype(config).itemsize, folded * FP32_BYTES
    return RankMemory(
        held.weights, held.gradients, held.optimizer, folded_weights, folded_gradients, gathered,
        activation_bytes(planned, stage, num_micro_batches(config, planned.grid.world_size)),
        max(held.exchange, bank_exchange), held.expert + folded_weights + folded_gradients,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _held_by_rank(
    description: Description, grid: RankGrid, rank: int, chunks: Chunks, banks: tuple[DescribedParameter, ...],
    zero: bool, bucket: int,
) -> _Held:  # fmt: skip
    """Returns the sums over all gradient buffers, and the largest exchange."""
    found = [*description.parameters(chunks), *banks]
    parts = [_held(buffer, grid.place(buffer[0].tag.gradient_group, rank), zero, bucket) for buffer in _buffers(found)]
    return _Held(
        sum(p.weights for p in parts), sum(p.gradients for p in parts), sum(p.optimizer for p in parts),
        max((p.exchange for p in parts), default=0), sum(p.expert for p in parts),
    )  # fmt: skip


@dataclass(frozen=True)
class _Held:
    weights: int
    gradients: int
    optimizer: int
    exchange: int
    expert: int


def _buffers(parameters: Iterable[DescribedParameter]) -> list[list[DescribedParameter]]:
    """Returns the parameters by gradient buffer; frozen ones and sharded banks each alone."""
    buffers: dict[tuple, list[DescribedParameter]] = {}
    for number, p in enumerate(parameters):
        alone = p.tag.slice is not None or not p.is_trained
        buffers.setdefault((number,) if alone else (p.tag.gradient_group, p.element_bytes), []).append(p)
    return list(buffers.values())


def _held(buffer: list[DescribedParameter], place: tuple[int, int], zero: bool, bucket: int) -> _Held:
    """Returns the bytes of one gradient buffer's parameters, with the largest temporary of its exchange.

    Args:
        place: size of the group that sums their gradients, and the rank's place in it.
        zero: whether the group's ranks update a slice of the buffer each.
    """
    first, own, size = buffer[0], sum(p.numel for p in buffer), place[0]
    element, exchange = first.element_bytes, 0
    weights, gradients = own * element, own * FP32_BYTES
    if not first.is_trained:
        return _Held(weights, 0, 0, 0, 0)
    if first.tag.slice is None and zero and size > 1:
        shard = -(-own // size)
        weights, gradients = shard * size * element, shard * size * FP32_BYTES
        # Of one buffer the reduced slice, or later the updated slice with all members' slices.
        part = min(1.0, max(bucket, *(p.largest for p in buffer)) / max(own, 1))
        exchange = int(part * max(shard * FP32_BYTES, shard * element + weights))
        own = max(0, min(shard, own - shard * place[1]))
    optimizer = own * (MOMENT_BYTES + (FP32_BYTES if element < FP32_BYTES else 0))
    share = sum(p.numel for p in buffer if p.tag.is_routed_expert) / max(sum(p.numel for p in buffer), 1)
    return _Held(weights, gradients, optimizer, exchange, round(share * (weights + gradients + optimizer)))


def _whole_banks(planned: PlannedModel, banks: list[DescribedParameter], stage: int) -> tuple[int, int]:
    """Returns the bytes of banks that are whole throughout a step, and the largest temporary of their exchange.

    Step mode takes one tensor at a time. Where banks are gathered, at the step's end stand beside each other the bank, its
    gradient, that in the order of its holders (twice while it is put in order) and the slice that is reduced of it. Where
    holders combine, a rank's weight gradients stand in the order of their receivers, beside those received and their sum.
    Layer mode keeps all banks and all their gradients.
    """
    if not banks:
        return 0, 0
    moe, grid, numels = planned.config.moe, planned.grid, [p.whole_numel for p in banks]
    num_banks, sizes = moe.num_expert_banks, [grid.place(p.tag.gradient_group, 0)[0] for p in banks]
    slices = [num_banks * -(-numel // (num_banks * size)) for numel, size in zip(numels, sizes, strict=True)]
    if moe.samoe_combine == "layer":
        temporaries = (2 * numel + held for numel, held in zip(numels, slices, strict=True))
        return 2 * FP32_BYTES * sum(numels), FP32_BYTES * max(temporaries)
    if not holders_combine(planned):
        return 0, FP32_BYTES * max(4 * numel + held for numel, held in zip(numels, slices, strict=True))
    own, everywhere = planned.moe_layers(stage), sum(planned.moe_layers(s) for s in range(grid.pp))
    return 0, FP32_BYTES * max(
        own * numel // num_banks + (size // grid.pp + 1) * everywhere * (held // num_banks)
        for numel, size, held in zip(numels, sizes, slices, strict=True)
    )


def holders_combine(planned: PlannedModel) -> bool:
    """Whether holders of a sharded pool exchange combined slices rather than banks."""
    moe, layers_of_stage = planned.config.moe, [range(planned.moe_layers(s)) for s in range(planned.grid.pp)]
    return moe.samoe_combine == "step" and exchange_saves(moe.num_expert_banks, layers_of_stage)
