"""Attention of a SaMoE language model: queries of each head, keys and values of fewer heads or from latents, rotary positions.

Shapes: B sequences, S tokens, D head size, R rotated channels of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def make_norm(config, size):
    """Returns a LayerNorm, or an RMSNorm without a bias, over the last dim."""
    if config.normalization == "LayerNorm":
        return nn.LayerNorm(size, eps=config.norm_epsilon)
    return nn.RMSNorm(size, eps=config.norm_epsilon)


def rotary_tables(config, positions, dtype):
    """Returns cos and sin, [B, 1, S, R], made in fp32."""
    frequencies, factor = rotary_frequencies(config, positions.device)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), -1)[:, None]
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotary_frequencies(config, device):
    """Returns the angle of one position for each pair of channels, [R / 2], and a factor on queries and keys."""
    whole = config.qk_pos_emb_head_dim if config.multi_latent_attention else config.head_dim
    rotated, kind, stretch = int(whole * config.rotary_percent), config.rope_scaling_type, config.rope_scaling_factor
    exponents = torch.arange(0, rotated, 2, device=device, dtype=torch.float32) / rotated
    plain = config.rotary_base**-exponents
    if kind is None:
        return plain, 1.0
    if kind == "linear":
        return plain / stretch, 1.0
    trained = config.rope_original_max_positions
    if kind == "llama3":  # by how often an angle turns over the trained length
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        keeps = ((trained * plain / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return (1 - keeps) * plain / stretch + keeps * plain, 1.0
    # YaRN: the channels whose angles turn so often over the trained length
    fast, slow = (
        rotated * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rotary_base))
        for turns in (config.yarn_beta_fast, config.yarn_beta_slow)
    )
    first, last = max(math.floor(fast), 0), min(math.ceil(slow), rotated - 1)
    width = last - first if last != first else 0.001
    keeps = 1 - ((torch.arange(rotated // 2, device=device, dtype=torch.float32) - first) / width).clamp(0, 1)
    given = config.yarn_attention_factor
    return plain / stretch * (1 - keeps) + plain * keeps, 0.1 * math.log(stretch) + 1.0 if given is None else given


def apply_rotary(x, tables):
    """Returns x [B, heads, S, D] with its first R channels rotated."""
    cos, sin = tables
    rotated = cos.shape[-1]
    turn, rest = x[..., :rotated], x[..., rotated:]
    first, second = turn.chunk(2, -1)
    turned = turn * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Returns attention's y [B, S, heads, D] and its weights, by plain products."""
    key, value = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class AttentionCore(nn.Module):
    """What both kinds of attention have in common: scores, by the function that the configuration names."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.kind, self.v_size = config.layer_types[layer_idx], config.head_dim
        self.sliding_window = config.sliding_window if self.kind == "sliding_attention" else None
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        factor = config.attention_multiplier
        self.scaling = config.head_dim**-0.5 if factor is None else factor

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, cache_position=None, **kwargs
    ):
        """Returns y [B, S, H] and attention's weights, if the function gives them."""
        query, key, value = self.project(hidden_states, position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, {"cache_position": cache_position})
        # vLLM finds a layer's attention by these lines: the function is looked up and called here, in forward, and nowhere else.
        attention_interface = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        kwargs["dropout"] = self.config.attention_dropout if self.training else 0.0
        kwargs["sliding_window"] = self.sliding_window
        y, weights = attention_interface(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        y = y.reshape(*hidden_states.shape[:2], -1, query.shape[-1])
        return self.o_proj(y[..., : self.v_size].flatten(2)), weights


class Attention(AttentionCore):
    """Causal self-attention with a projection each for queries, keys and values."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        size, hidden = config.head_dim, config.hidden_size
        self.q_proj = nn.Linear(hidden, heads * size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, kv_heads * size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, kv_heads * size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * size, hidden, bias=config.attention_output_bias)
        self.norms_all = config.qk_layernorm_scope == "all"
        self.q_norm = self.k_norm = None
        if config.qk_layernorm:
            self.q_norm, self.k_norm = (
                make_norm(config, size * count if self.norms_all else size) for count in (heads, kv_heads)
            )

    def project(self, hidden_states, position_embeddings):
        """Returns rotated queries and keys, and values, [B, heads, S, D]."""
        shape = (*hidden_states.shape[:-1], -1, self.config.head_dim)
        query, key, value = (project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.norms_all:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (t.view(shape) for t in (query, key, value))
        if self.q_norm is not None and not self.norms_all:
            query, key = self.q_norm(query), self.k_norm(key)
        clip = self.config.clip_qkv
        if clip is not None:
            query, key, value = (t.clamp(-clip, clip) for t in (query, key, value))
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        if position_embeddings is not None:
            query, key = apply_rotary(query, position_embeddings), apply_rotary(key, position_embeddings)
        return query, key, value


class LatentAttention(AttentionCore):
    """Multi-head latent attention (DeepSeek-V2): a token's keys and values are made from one latent, with positions in a part of
    the key that all heads share. head_dim is the size of a query; values are filled up to it."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        heads, hidden = config.num_attention_heads, config.hidden_size
        rank, q_rank = config.kv_lora_rank, config.q_lora_rank
        self.plain, self.turned, self.v_size = config.qk_head_dim, config.qk_pos_emb_head_dim, config.v_head_dim
        if q_rank is None:
            self.q_proj = nn.Linear(hidden, heads * config.head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, q_rank, bias=False)
            self.q_a_layernorm = make_norm(config, q_rank)
            self.q_b_proj = nn.Linear(q_rank, heads * config.head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, rank + self.turned, bias=False)
        self.kv_a_layernorm = make_norm(config, rank)
        self.kv_b_proj = nn.Linear(rank, heads * (self.plain + self.v_size), bias=False)
        self.o_proj = nn.Linear(heads * self.v_size, hidden, bias=config.attention_output_bias)

    def project(self, hidden_states, position_embeddings):
        """Returns rotated queries and keys, and values, [B, heads, S, D]."""
        shape, size = (*hidden_states.shape[:-1], self.config.num_attention_heads, -1), self.config.head_dim
        if self.config.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        query = query.view(shape).transpose(1, 2)
        latent, turned_key = self.kv_a_proj_with_mqa(hidden_states).split((self.config.kv_lora_rank, self.turned), -1)
        key_value = self.kv_b_proj(self.kv_a_layernorm(latent)).view(shape).transpose(1, 2)
        key, value = key_value.split((self.plain, self.v_size), -1)
        plain, turned = query.split((self.plain, self.turned), -1)
        turned, turned_key = (apply_rotary(t, position_embeddings) for t in (turned, turned_key[:, None]))
        query = torch.cat((plain, turned), -1)
        key = torch.cat((key, turned_key.expand(-1, key.shape[1], -1, -1)), -1)
        return query, key, F.pad(value, (0, size - self.v_size))
