"""Latent attention in Megatron-LM's arguments, and in our configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_samoe.config.model import ModelConfig
from megatron_samoe.errors import CheckpointError, ConfigError

_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
_YARN = {
    "rope_scaling_factor": "rotary_scaling_factor",
    "rope_original_max_positions": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


def written_latents(model: ModelConfig) -> dict[str, Any]:
    """Returns the arguments of a model with latent attention, whose latents Megatron norms with --qk-layernorm; none of
    another model.

    Raises:
        ConfigError: Megatron does not scale positions or scores so.
    """
    latent, scaling = model.multi_latent_attention, model.rope_scaling_type
    if scaling is not None and not (latent and scaling == "yarn"):
        raise ConfigError("--rope-scaling-type", scaling, "Megatron has yarn only, with --multi-latent-attention")
    if model.attention_multiplier is not None and scaling is None:
        raise ConfigError("--attention-multiplier", model.attention_multiplier, "Megatron has none but YaRN's")
    if not latent:
        return {}
    sizes = {"multi_latent_attention": True, "qk_layernorm": True, **{name: getattr(model, name) for name in _SIZES}}
    if model.rope_scaling_type is None:
        return {**sizes, "rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    log = 0.1 * math.log(max(model.rope_scaling_factor, 1.0))
    usual, given = model.query_dim**-0.5, model.attention_multiplier
    of_scores = 1.0 if given is None else math.sqrt(given / usual)
    of_angles = log + 1 if model.yarn_attention_factor is None else model.yarn_attention_factor
    mscales = {"mscale": 1.0, "mscale_all_dim": 0.0}
    if log:
        mscales = {"mscale": (of_angles * of_scores - 1) / log, "mscale_all_dim": (of_scores - 1) / log}
    return {**sizes, "rope_type": "yarn", **{theirs: getattr(model, ours) for ours, theirs in _YARN.items()}, **mscales}


def read_latents(model: ModelConfig, get: Callable[..., Any], where: str) -> ModelConfig:
    """Returns a model with the latent attention of its arguments, which `get` gives by name, with a default.

    Raises:
        CheckpointError: our model cannot compute it.
    """
    # Latents are normed here, as Megatron norms them with --qk-layernorm.
    needed = {"qk_layernorm": True, "position_embedding_type": "rope", "rotary_percent": 1.0, "add_qkv_bias": False}
    given = {name: getattr(model, name) for name in needed}
    wrong = [
        f"{name} is {given[name]!r}; it must be {value} with latent attention"
        for name, value in needed.items()
        if given[name] != value
    ]
    kind = get("rope_type", "yarn")
    if kind not in ("rope", "yarn"):
        wrong.append(f"rope_type is {kind!r}; it must be rope or yarn")
    missing = [name for name in _SIZES[1:] if type(get(name)) is not int]
    if missing:
        wrong.append(f"{missing[0]} is missing")
    if wrong:
        raise CheckpointError(f"{where} is of a model that this program cannot compute: {'; '.join(wrong)}.")
    sizes = {name: get(name) for name in _SIZES}
    unused: dict[str, Any] = {
        "qk_layernorm": False,
        "kv_channels": None,
        "group_query_attention": False,
        "num_query_groups": 1,
    }
    model = replace(model, **sizes, **unused, multi_latent_attention=True)
    factor, all_dim = float(get("rotary_scaling_factor", 1.0)), float(get("mscale_all_dim", 0.0))
    log = 0.1 * math.log(factor) if factor > 1 else 0.0
    if all_dim * log:
        model = replace(model, attention_multiplier=(all_dim * log + 1) ** 2 * model.query_dim**-0.5)
    if kind == "rope" or factor <= 1:
        return model
    return replace(
        model,
        rope_scaling_type="yarn",
        rope_scaling_factor=factor,
        rope_original_max_positions=get("original_max_position_embeddings", 4096),
        yarn_beta_fast=float(get("beta_fast", 32.0)),
        yarn_beta_slow=float(get("beta_slow", 1.0)),
        yarn_attention_factor=(float(get("mscale", 1.0)) * log + 1) / (all_dim * log + 1),
    )
