"""Parameters and floating-point operations of a configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.parallel_state.rank_grid import RankGrid
from megatron_samoe.planning.description import rank_parameters, whole_model


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters.

    Attributes:
        total: stored, padding of the vocabulary included.
        expert: of routed experts (all layers' own, or the pool's banks).
        active: that work on one token: all but the routed experts, plus K experts in each MoE layer. A SaMoE counts
            combined experts, which is what a token meets.
    """

    total: int
    expert: int
    active: int


def count_parameters(config: PretrainConfig, vocab_size: int) -> ParameterCount:
    """Returns the parameters of the whole model."""
    description, chunks = whole_model(config, vocab_size)
    found = rank_parameters(replace(config, parallel=ParallelConfig()), vocab_size, RankGrid(1), 0)
    total = sum(p.numel for p in found)
    expert = sum(p.numel for p in found if p.tag.is_routed_expert)
    chosen = sum(
        description.layer(place).moe.router.experts_per_token * description.layer(place).moe.shape.expert_parameters
        for plan in chunks for place in plan.layers if place.num_experts
    )  # fmt: skip
    return ParameterCount(total, expert, total - expert + int(chosen))


def train_flops_per_token(config: PretrainConfig, vocab_size: int) -> float:
    """Returns multiply-adds x 2 of forward and backward per token, counted in matrix products; recomputation excluded.

    Six per active weight in a product, and causal attention's two products over half of the sequence on average.
    """
    description, chunks = whole_model(config, vocab_size)
    layers = sum(description.layer(place).flops_per_token() for plan in chunks for place in plan.layers)
    return 3.0 * (layers + description.ends(chunks[0]).head_flops_per_token())
