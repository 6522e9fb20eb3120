"""Rules of a model's sizes, which must fit each other."""

from __future__ import annotations

from megatron_samoe.config import needs
from megatron_samoe.config.option import flag
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.rules import Rows, Table


def _heads(config: PretrainConfig, _: int) -> Rows:
    model = config.model
    heads = model.num_attention_heads
    is_narrow = model.ffn_hidden_size is None and model.mlp_size < 1
    yield "hidden_size", is_narrow, "is too small for --swiglu's derived MLP; give --ffn-hidden-size"
    is_uneven = model.kv_channels is None and model.hidden_size % heads
    yield "num_attention_heads", is_uneven, f"must divide --hidden-size {model.hidden_size}, or give --kv-channels"
    yield "num_query_groups", heads % model.num_kv_heads, f"must divide --num-attention-heads {heads}"
    is_said_twice = model.add_qkv_bias and model.attention_bias is not None
    yield "add_qkv_bias", is_said_twice, "has no use with --attention-bias, which says it of both projections"
    skip, layers = model.window_attn_skip_freq, model.num_layers
    is_outside = skip is not None and not 2 <= skip <= max(layers, 2)
    yield "window_attn_skip_freq", is_outside, f"must be from 2 to the {layers} layers"
    needs_rms = model.qk_layernorm_scope == "all" and model.normalization != "RMSNorm"
    yield "qk_layernorm_scope", needs_rms, "needs --normalization RMSNorm"


def _positions(config: PretrainConfig, _: int) -> Rows:
    model = config.model
    share, scaling = model.rotary_percent, model.rope_scaling_type
    turns_heads = model.position_embedding_type == "rope" and not model.multi_latent_attention
    is_odd = turns_heads and (not 0 < share <= 1 or model.head_dim * share % 2)
    yield "rotary_percent", is_odd, f"must leave an even, whole number of the {model.head_dim} head channels to rotate"
    yield "rotary_base", scaling == "yarn" and model.rotary_base <= 1, "must be above 1 with --rope-scaling-type yarn"
    yield "rope_scaling_factor", scaling is not None and model.rope_scaling_factor < 1, "must be 1 or more"
    is_unknown = needs.TRAINED_LENGTH.is_met(config) and model.rope_original_max_positions is None
    yield "rope_original_max_positions", is_unknown, f"must be given with --rope-scaling-type {scaling}"
    for low, high in (("rope_low_freq_factor", "rope_high_freq_factor"), ("yarn_beta_slow", "yarn_beta_fast")):
        limit = getattr(model, high)
        yield low, getattr(model, low) >= limit, f"must be below {flag(high)} {limit}"
    is_short = model.position_embedding_type == "learned_absolute" and model.max_positions < model.seq_length
    allowed = f"must be at least --seq-length {model.seq_length} with learned positions"
    yield "max_position_embeddings", is_short, allowed, model.max_positions


def _latents(config: PretrainConfig, _: int) -> Rows:
    model = config.model
    if not model.multi_latent_attention:
        return
    is_turned = model.position_embedding_type == "rope"
    yield "multi_latent_attention", not is_turned, "needs --position-embedding-type rope"
    defaults: dict[str, object] = {
        "group_query_attention": False,
        "kv_channels": None,
        "qk_layernorm": False,
        "add_qkv_bias": False,
    }
    defaults |= {"attention_bias": None, "clip_qkv": None, "rotary_percent": 1.0}
    for name, default in defaults.items():
        allowed = "has no use with --multi-latent-attention, which has sizes and norms of its own"
        yield name, getattr(model, name) != default, allowed
    yield "qk_pos_emb_head_dim", model.qk_pos_emb_head_dim % 2, "must be even"
    queries = model.query_dim
    yield "v_head_dim", model.v_head_dim > queries, f"must be at most --qk-head-dim + --qk-pos-emb-head-dim {queries}"


TABLES = (Table(("model",), _heads), Table(("model",), _positions), Table(("model",), _latents))
