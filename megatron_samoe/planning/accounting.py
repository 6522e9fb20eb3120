"""Counts of a configuration's parameters and floating-point operations."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_samoe.config.derived import num_micro_batches, virtual_stages
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.pipeline_parallel.schedule_plan import bubble_fraction
from megatron_samoe.planning.description import unsharded_model


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of a model's parameters.

    Attributes:
        total: all stored parameters, padding of the vocabulary included.
        expert: parameters of routed experts (all layers' own, or the pool's banks).
        active: parameters that work on one token: all but the routed experts, plus K experts in each MoE layer. A SaMoE
            counts combined experts, which a token uses.
    """

    total: int
    expert: int
    active: int


def count_parameters(config: PretrainConfig, vocab_size: int) -> ParameterCount:
    """Returns the parameter counts of the full model."""
    unsharded = unsharded_model(config, vocab_size)
    found = unsharded.parameters(0)
    total = sum(p.numel for p in found)
    expert = sum(p.numel for p in found if p.tag.is_routed_expert)
    moe_layers = [unsharded.description.layer(spec).moe for spec in unsharded.layers() if spec.num_experts]
    chosen = sum(layer.router.experts_per_token * layer.shape.expert_parameters for layer in moe_layers)
    return ParameterCount(total, expert, total - expert + int(chosen))


def train_flops_per_token(config: PretrainConfig, vocab_size: int) -> float:
    """Returns multiply-adds x 2 of the matrix products of forward and backward per token, without recomputation.

    That is six per active weight in a product, plus causal attention's two products over half the sequence on average.
    """
    return 3.0 * forward_flops_per_token(config, vocab_size)


def forward_flops_per_token(config: PretrainConfig, vocab_size: int) -> float:
    """Returns the forward pass's part of `train_flops_per_token`."""
    unsharded, model = unsharded_model(config, vocab_size), config.model
    traces = [unsharded.description.trace(spec, 1) for spec in unsharded.layers()]
    traces.append(unsharded.description.head_trace(1, fuses_loss=False))
    products = sum(trace.forward_flops - trace.core_flops for trace in traces) / model.seq_length
    width = model.query_dim + model.v_head_dim if model.multi_latent_attention else 2 * model.head_dim
    return products + 2.0 * model.num_layers * model.num_attention_heads * width * model.mean_keys


def idle_share(config: PretrainConfig, world_size: int) -> float:
    """Returns the share of a step for which a pipeline is idle while it fills and drains."""
    stages = config.parallel.pipeline_model_parallel_size
    chunks = virtual_stages(config.parallel, config.model.num_layers) // stages
    return bubble_fraction(stages, chunks, num_micro_batches(config, world_size))
