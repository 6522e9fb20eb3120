"""Bytes that a decoding step must read, by which its time is bound: arithmetic on a configuration."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_samoe.config.derived import num_moe_layers
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.inference.serving import WEIGHT_BYTES, Precision, Serving
from megatron_samoe.models.accounting import count_parameters, mlp_parameters


def expected_distinct_experts(num_experts: int, topk: int, num_tokens: int) -> float:
    """Returns the expected number of experts that some of the tokens choose, each token K of E evenly and alone.

    An expert is missed by a token with probability 1 - K / E, so by all of B with its B-th power.
    """
    return num_experts * (1.0 - (1.0 - topk / num_experts) ** num_tokens)


@dataclass(frozen=True)
class StepBytes:
    """What one step of a batch reads: experts, all other weights, and the key-value cache."""

    experts: float
    others: float
    cache: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.experts + self.others + self.cache


def step_bytes(
    config: PretrainConfig, vocab_size: int, batch: int, context: float, serving: Serving, dtype: Precision,
    distinct: float | None = None,
) -> StepBytes:  # fmt: skip
    """Returns the bytes of one token for each of `batch` sequences; each needed weight counts once.

    Args:
        context: mean number of positions that a token attends to.
        serving: on-the-fly reads P banks for each expert, as if none were in its cache.
        distinct: experts hit per MoE layer, as counted; `expected_distinct_experts` if not given.
    """
    model, moe = config.model, config.moe
    layers, width = num_moe_layers(config), WEIGHT_BYTES[dtype]
    count = count_parameters(config, vocab_size)
    ffn = config.expert_ffn_size
    bias = not model.disable_bias_linear
    expert = mlp_parameters(model.hidden_size, ffn, model.swiglu, bias)
    rows = ffn * (2 if model.swiglu else 1) + model.hidden_size  # with a scale each in int8
    if distinct is None:
        distinct = expected_distinct_experts(moe.num_experts, moe.moe_router_topk, batch) if layers else 0.0
    banks = moe.num_expert_banks if serving == "on-the-fly" else 1
    expert_bytes = layers * distinct * banks * (width * expert + (4 * rows if dtype == "int8" else 0))
    # A row of the embedding is read for each token, the whole of it only as the output matrix.
    tables = vocab_size * model.hidden_size if model.untie_embeddings_and_output_weights else 0
    if model.position_embedding_type == "learned_absolute":
        tables += model.max_positions * model.hidden_size
    routers = layers * model.hidden_size * moe.num_experts
    others = width * (count.total - count.expert - tables - routers) + 4 * routers
    kept = 4 if dtype == "fp32" else 2
    cache = batch * context * 2 * model.num_kv_heads * model.head_dim * model.num_layers * kept
    return StepBytes(expert_bytes, others, cache)
