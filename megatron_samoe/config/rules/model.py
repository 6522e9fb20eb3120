"""Rules of a model's sizes, which must fit each other."""

from __future__ import annotations

from megatron_samoe.config import needs
from megatron_samoe.config.option import flag
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.rules import Rule, Rules, Table


def _heads(config: PretrainConfig, _: int) -> Rules:
    model = config.model
    heads = model.num_attention_heads
    if model.ffn_hidden_size is None:
        yield Rule("hidden_size", model.mlp_size < 1, "is too small for --swiglu's derived MLP; give --ffn-hidden-size")
    if model.kv_channels is None:
        allowed = f"must divide --hidden-size {model.hidden_size}, or give --kv-channels"
        yield Rule("num_attention_heads", model.hidden_size % heads, allowed)
    yield Rule("num_query_groups", heads % model.num_kv_heads, f"must divide --num-attention-heads {heads}")
    if model.attention_bias is not None:
        allowed = "has no use with --attention-bias, which says it of both projections"
        yield Rule("add_qkv_bias", model.add_qkv_bias, allowed)
    skip, layers = model.window_attn_skip_freq, model.num_layers
    if skip is not None:
        is_legal = 2 <= skip <= max(layers, 2)
        yield Rule("window_attn_skip_freq", not is_legal, f"must be from 2 to the {layers} layers")
    if model.qk_layernorm_scope == "all":
        yield Rule("qk_layernorm_scope", model.normalization != "RMSNorm", "needs --normalization RMSNorm")


def _positions(config: PretrainConfig, _: int) -> Rules:
    model = config.model
    share, scaling = model.rotary_percent, model.rope_scaling_type
    if model.position_embedding_type == "rope" and not model.multi_latent_attention:
        is_legal = 0 < share <= 1 and model.head_dim * share % 2 == 0
        allowed = f"must leave an even, whole number of the {model.head_dim} head channels to rotate"
        yield Rule("rotary_percent", not is_legal, allowed)
    if scaling == "yarn":
        yield Rule("rotary_base", model.rotary_base <= 1, "must be above 1 with --rope-scaling-type yarn")
    if scaling is not None:
        yield Rule("rope_scaling_factor", model.rope_scaling_factor < 1, "must be 1 or more")
    if needs.TRAINED_LENGTH.is_met(config):
        allowed = f"must be given with --rope-scaling-type {scaling}"
        yield Rule("rope_original_max_positions", model.rope_original_max_positions is None, allowed)
    for low, high in (("rope_low_freq_factor", "rope_high_freq_factor"), ("yarn_beta_slow", "yarn_beta_fast")):
        limit = getattr(model, high)
        yield Rule(low, getattr(model, low) >= limit, f"must be below {flag(high)} {limit}")
    if model.position_embedding_type == "learned_absolute":
        positions, length = model.max_positions, model.seq_length
        allowed = f"must be at least --seq-length {length} with learned positions"
        yield Rule("max_position_embeddings", positions < length, allowed, positions)


def _latents(config: PretrainConfig, _: int) -> Rules:
    model = config.model
    if not model.multi_latent_attention:
        return
    positions = model.position_embedding_type
    yield Rule("multi_latent_attention", positions != "rope", "needs --position-embedding-type rope")
    defaults: dict[str, object] = dict.fromkeys(("group_query_attention", "qk_layernorm", "add_qkv_bias"), False)
    defaults |= {"kv_channels": None, "attention_bias": None, "clip_qkv": None, "rotary_percent": 1.0}
    for name, default in defaults.items():
        allowed = "has no use with --multi-latent-attention, which has sizes and norms of its own"
        yield Rule(name, getattr(model, name) != default, allowed)
    yield Rule("qk_pos_emb_head_dim", model.qk_pos_emb_head_dim % 2, "must be even")
    queries = model.query_dim
    allowed = f"must be at most --qk-head-dim + --qk-pos-emb-head-dim {queries}"
    yield Rule("v_head_dim", model.v_head_dim > queries, allowed)


TABLES = (Table(("model",), _heads), Table(("model",), _positions), Table(("model",), _latents))
