"""Parameters and floating-point operations of a configuration: pure arithmetic, checked against built models."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_samoe.config.derived import num_moe_layers
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.tensor_parallel.layers import padded_vocab_size


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


def mlp_parameters(hidden: int, ffn: int, gated: bool, bias: bool) -> int:
    """Returns the parameters of one MLP or expert."""
    up = 2 * ffn if gated else ffn
    return up * hidden + ffn * hidden + (up + hidden if bias else 0)


def count_parameters(config: PretrainConfig, vocab_size: int) -> ParameterCount:
    """Returns the parameters of the whole model."""
    model, moe = config.model, config.moe
    hidden, bias = model.hidden_size, not model.disable_bias_linear
    vocab = padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by)
    norm = hidden * (2 if model.normalization == "LayerNorm" else 1)
    moe_layers = num_moe_layers(config)
    dense_layers = model.num_layers - moe_layers

    embedding = vocab * hidden * (2 if model.untie_embeddings_and_output_weights else 1)
    if model.position_embedding_type == "learned_absolute":
        embedding += model.max_positions * hidden
    attention = _attention_parameters(config)
    dense_mlp = mlp_parameters(hidden, model.mlp_size, model.swiglu, bias)
    shared = moe.moe_shared_expert_intermediate_size
    per_moe_layer = hidden * moe.num_experts
    if shared is not None:
        per_moe_layer += mlp_parameters(hidden, shared, model.swiglu, bias)
    if moe.has_pool:
        per_moe_layer += 2 * moe.num_expert_banks * (moe.num_experts if moe.samoe_granularity == "expert" else 1)
    always = (
        embedding + norm + model.num_layers * (attention + 2 * norm) + dense_layers * dense_mlp
        + moe_layers * per_moe_layer
    )  # fmt: skip
    one_expert = mlp_parameters(hidden, config.expert_ffn_size, model.swiglu, bias)
    sets = moe.num_expert_banks if moe.has_pool else moe_layers
    expert = sets * moe.num_experts * one_expert if moe_layers else 0
    return ParameterCount(always + expert, expert, always + moe_layers * moe.moe_router_topk * one_expert)


def _attention_parameters(config: PretrainConfig) -> int:
    model = config.model
    heads, kv_heads, head_dim, hidden = model.num_attention_heads, model.num_kv_heads, model.head_dim, model.hidden_size
    qkv = (heads + 2 * kv_heads) * head_dim
    parameters = qkv * hidden + heads * head_dim * hidden
    parameters += (qkv if model.qkv_bias else 0) + (0 if model.disable_bias_linear else hidden)
    if model.qk_layernorm:
        parameters += 2 * head_dim * (2 if model.normalization == "LayerNorm" else 1)
    return parameters


def train_flops_per_token(config: PretrainConfig, vocab_size: int) -> float:
    """Returns multiply-adds x 2 of forward and backward per token, counted in matrix products; recomputation excluded.

    Six per active weight in a product (the embedding table counts once, as the head), and causal attention's two
    products over half of the sequence on average.
    """
    model = config.model
    active = count_parameters(config, vocab_size).active
    tables = model.max_positions * model.hidden_size if model.position_embedding_type == "learned_absolute" else 0
    if model.untie_embeddings_and_output_weights:
        tables += padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by) * model.hidden_size
    attention = 2 * 2 * model.num_layers * model.num_attention_heads * model.head_dim * model.seq_length / 2
    return 6.0 * (active - tables) + 3.0 * attention
