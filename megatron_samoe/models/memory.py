"""Bytes that each rank holds while it trains, by part: pure arithmetic, checked against built models.

Weights, gradients and optimizer state are exact: they follow from the same tags as the buffers themselves (which ranks
sum a gradient, which dims are split). Activations are counted from what autograd keeps of this package's layers, with
evenly loaded experts and attention that does not keep its probabilities.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from megatron_samoe.config.derived import num_micro_batches, num_moe_layers
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.training import TrainingConfig
from megatron_samoe.models.activation_memory import activation_bytes
from megatron_samoe.models.layer_layout import StagePlan
from megatron_samoe.models.local_parameters import (
    FP32_BYTES,
    LocalParameter,
    RankPlace,
    bank_parameters,
    compute_bytes,
    distinct_stages,
    local_parameters,
    plans_by_rank,
    rank_grid,
)

#: Elements from which a gradient buffer is closed, unless --ddp-bucket-size says otherwise.
BUCKET_SIZE = 40_000_000
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
            shared out.
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
    place = RankPlace(rank_grid(config, world_size), rank)
    held = _held_by_rank(state_key(config), vocab_size, place)
    plans = plans_by_rank(config)[place.pipeline_rank]
    banks = bank_parameters(config, place)
    gathered, bank_exchange = _whole_banks(config, [p for p in banks if p.is_shared_out], plans, place)
    folded = _folded_elements(config, plans, banks)
    folded_weights, folded_gradients = folded * compute_bytes(config), folded * FP32_BYTES
    return RankMemory(
        held.weights, held.gradients, held.optimizer, folded_weights, folded_gradients, gathered,
        activation_bytes(
            config, vocab_size, place.grid, place.pipeline_rank, plans, num_micro_batches(config, world_size)
        ),
        max(held.exchange, bank_exchange), held.expert + folded_weights + folded_gradients,
    )  # fmt: skip


def state_key(config: PretrainConfig, combine: Literal["step", "layer"] = "step") -> PretrainConfig:
    """Returns the configuration without what parameters do not depend on, so that layouts share what was counted."""
    return PretrainConfig(
        model=config.model, parallel=config.parallel, moe=replace(config.moe, samoe_combine=combine),
        training=TrainingConfig(bf16=compute_bytes(config) < FP32_BYTES),
    )  # fmt: skip


@lru_cache(maxsize=256)
def _held_by_rank(config: PretrainConfig, vocab_size: int, place: RankPlace) -> _Held:
    """Returns the sums over all gradient buffers, and the largest exchange."""
    parts = [_held(buffer, place, config) for buffer in _buffers(local_parameters(config, vocab_size, place))]
    return _Held(
        sum(p.weights for p in parts), sum(p.gradients for p in parts), sum(p.optimizer for p in parts),
        max((p.exchange for p in parts), default=0), sum(p.expert for p in parts),
    )  # fmt: skip


def largest_rank_memory(config: PretrainConfig, vocab_size: int, world_size: int) -> tuple[int, RankMemory]:
    """Returns the rank that needs most, and what it needs.

    Of stages that hold alike the first holds the most passes in flight, and of a stage's ranks the first the longest runs,
    so few ranks are looked at.
    """
    per_stage = world_size // config.parallel.pipeline_model_parallel_size
    ranks = [stage * per_stage for stage in distinct_stages(config)]
    return max(((rank, rank_memory(config, vocab_size, world_size, rank)) for rank in ranks), key=lambda p: p[1].total)


@dataclass(frozen=True)
class _Held:
    weights: int
    gradients: int
    optimizer: int
    exchange: int
    expert: int


def _buffers(parameters: Iterable[LocalParameter]) -> list[list[LocalParameter]]:
    """Returns the parameters by gradient buffer; frozen ones and shared-out banks each alone."""
    buffers: dict[tuple, list[LocalParameter]] = {}
    for number, p in enumerate(parameters):
        key = (number,) if p.is_shared_out or not p.is_trained else (p.group, p.element_bytes)
        buffers.setdefault(key, []).append(p)
    return list(buffers.values())


def _held(buffer: list[LocalParameter], place: RankPlace, config: PretrainConfig) -> _Held:
    """Returns the bytes of one gradient buffer's parameters, with the largest temporary of its exchange."""
    first, total = buffer[0], sum(p.numel for p in buffer)
    element, size = first.element_bytes, place.group_size(first.group)
    run = -(-total // size)
    own = max(0, min(run, total - run * place.group_rank(first.group)))
    exchange = 0
    if not first.is_trained:
        return _Held(total * element, 0, 0, 0, 0)
    if first.is_shared_out:
        own = _bank_run(first, place, config) * config.moe.num_expert_banks
        weights, gradients = own * element, own * FP32_BYTES
    elif config.parallel.use_distributed_optimizer and size > 1:
        weights, gradients = run * size * element, run * size * FP32_BYTES
        # Of one buffer the reduced run, or later the updated run with all members' runs.
        bucket = config.parallel.ddp_bucket_size or BUCKET_SIZE
        part = min(1.0, max(bucket, _largest_tensor(config, place)) / max(total, 1))
        exchange = int(part * max(run * FP32_BYTES, run * element + weights))
    else:
        own, weights, gradients = total, total * element, total * FP32_BYTES
    optimizer = own * (MOMENT_BYTES + (FP32_BYTES if element < FP32_BYTES else 0))
    share = sum(p.numel for p in buffer if p.is_expert) / max(total, 1)
    return _Held(weights, gradients, optimizer, exchange, round(share * (weights + gradients + optimizer)))


def _folded_elements(config: PretrainConfig, plans: Iterable[StagePlan], banks: list[LocalParameter]) -> int:
    if not config.moe.has_pool or config.moe.samoe_combine != "step":
        return 0
    layers = sum(layer.moe_index is not None for plan in plans for layer in plan.layers)
    return layers * sum(p.numel for p in banks) // config.moe.num_expert_banks


def _bank_run(bank: LocalParameter, place: RankPlace, config: PretrainConfig, member: int | None = None) -> int:
    """Returns the elements of each bank that this rank, or another member of its group, holds."""
    whole, size = bank.numel // config.moe.num_expert_banks, place.group_size(bank.group)
    run = -(-whole // size)
    return max(0, min(run, whole - run * (place.group_rank(bank.group) if member is None else member)))


def _largest_tensor(config: PretrainConfig, place: RankPlace) -> int:
    """Returns the elements of the largest parameter that a gradient buffer may have to take alone."""
    model, moe = config.model, config.moe
    mlp = model.mlp_size * model.hidden_size // place.grid.tp
    sets = moe.num_expert_banks if moe.has_pool else 1
    width = config.expert_ffn_size
    experts = sets * moe.num_experts // place.grid.ep * width * model.hidden_size // place.grid.etp
    return (2 if model.swiglu else 1) * (mlp if moe.expert_layout == "dense" else max(mlp, experts))


def _whole_banks(
    config: PretrainConfig, banks: list[LocalParameter], plans: Iterable[StagePlan], place: RankPlace
) -> tuple[int, int]:
    """Returns the bytes of banks that are whole throughout a step, and the largest temporary of their exchange.

    Step mode takes one tensor at a time. Where banks are gathered, at the step's end stand beside each other the bank, its
    gradient, that in the order of its holders (twice while it is put in order) and the run that is reduced of it. Where
    holders combine, a rank's weight gradients stand in the order of their receivers, beside those received and their sum.
    Layer mode keeps all banks and all their gradients.
    """
    if not banks:
        return 0, 0
    num_banks = config.moe.num_expert_banks
    runs = {p: num_banks * -(-p.numel // (num_banks * place.group_size(p.group))) for p in banks}
    if config.moe.samoe_combine == "layer":
        return 2 * FP32_BYTES * sum(p.numel for p in banks), max(FP32_BYTES * (2 * p.numel + runs[p]) for p in banks)
    if not holders_combine(config):
        return 0, max(FP32_BYTES * (4 * p.numel + runs[p]) for p in banks)
    own = sum(layer.moe_index is not None for plan in plans for layer in plan.layers)
    everywhere = num_moe_layers(config)

    def temporaries(bank: LocalParameter) -> int:
        copies = place.group_size(bank.group) // place.grid.pp
        run = runs[bank] // num_banks
        return FP32_BYTES * (own * bank.numel // num_banks + (copies + 1) * everywhere * run)

    return 0, max(map(temporaries, banks))


def holders_combine(config: PretrainConfig) -> bool:
    """Whether holders of a shared-out pool exchange combined slices, as they do where a stage has fewer MoE layers than the
    pool has banks, rather than banks."""
    per_stage = (
        sum(layer.moe_index is not None for plan in plans for layer in plan.layers) for plans in plans_by_rank(config)
    )
    return config.moe.samoe_combine == "step" and config.moe.num_expert_banks > max(per_stage)
