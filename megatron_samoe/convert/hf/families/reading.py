"""Our options from completed entries of config.json; whatever changes the function is understood or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_samoe.config.derived import written_layer_freq
from megatron_samoe.config.model import ModelConfig
from megatron_samoe.convert.hf.families.entries import CannotCompute, Entries, completed, may, needed, only, wrong_entry

#: Factors of Granite's classes, which our options have the names of.
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
#: Entries of scaled positions: theirs and ours.
_ROPE_OPTIONS = {
    "factor": "rope_scaling_factor",
    "original_max_position_embeddings": "rope_original_max_positions",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "attention_factor": "yarn_attention_factor",
}
_LENGTH = "original_max_position_embeddings"
_ROPE = {"rope_theta": needed(float), "partial_rotary_factor": 1.0}
_SCALED = {**_ROPE, "factor": needed(float)}
_TRAINED = {**_SCALED, _LENGTH: needed(int)}
_OF_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
#: Entries of positions by kind. Kinds and entries that are not here are refused.
_KINDS = {
    "default": Entries(_ROPE),
    "linear": Entries(_SCALED),
    "llama3": Entries({**_TRAINED, "low_freq_factor": needed(float), "high_freq_factor": needed(float)}),
    "yarn": Entries({**_TRAINED, **dict.fromkeys(_OF_YARN, may(float)), "truncate": only(True)}),
}


def written_rope(model: ModelConfig) -> dict[str, Any]:
    """Returns the entries of rotary positions over whole heads."""
    kind = model.rope_scaling_type or "default"
    given = {theirs: getattr(model, ours) for theirs, ours in _ROPE_OPTIONS.items() if theirs in _KINDS[kind].table}
    rope = {"rope_type": kind, **{name: value for name, value in given.items() if value is not None}}
    # Both the names that transformers 4 knows and the one of transformers 5.
    old = {} if kind == "default" else {"rope_scaling": rope}
    return {"rope_theta": model.rotary_base, **old, "rope_parameters": {**rope, "rope_theta": model.rotary_base}}


def rope_of(
    config: Mapping[str, Any], theta: str = "rope_theta", share: str = "partial_rotary_factor"
) -> dict[str, Any]:
    """Returns the entries of rotary positions as transformers 5 resolves them: rope_scaling goes before rope_parameters,
    and what is inside it before what is next to it, except for the first length.

    Args:
        theta, share: names of the base and of the rotated share of a head outside it.

    Raises:
        ConfigError: positions are scaled in a way that we do not know.
    """
    key = "rope_scaling" if config["rope_scaling"] else "rope_parameters"
    given = dict(config[key] or {})
    kind = given.pop("type", "default")
    kind = given.pop("rope_type", kind)
    if not isinstance(kind, str) or kind not in _KINDS:
        kinds = ", ".join(map(repr, _KINDS))
        raise wrong_entry(key, kind, f"{CannotCompute}; rope_type must be one of {kinds}")
    given.setdefault("rope_theta", config[theta])
    if config[share] is not None:
        given.setdefault("partial_rotary_factor", config[share])
    if _LENGTH in _KINDS[kind].table:
        given[_LENGTH] = config.get(_LENGTH, given.get(_LENGTH, config["max_position_embeddings"]))
    return {"rope_type": kind, **completed(_KINDS[kind], given, f"{key} of type {kind}")}


def rotary(
    config: Mapping[str, Any], theta: str = "rope_theta", share: str = "partial_rotary_factor"
) -> dict[str, Any]:
    """Returns the native options of rotary positions; see `rope_of`."""
    rope = rope_of(config, theta, share)
    options = {"rotary_base": float(rope["rope_theta"]), "rotary_percent": float(rope["partial_rotary_factor"])}
    if rope["rope_type"] == "default":
        return options
    # YaRN's numbers are theirs if they are 0, except for the factor on attention.
    scaled = {
        ours: rope[theirs]
        for theirs, ours in _ROPE_OPTIONS.items()
        if rope.get(theirs) or (theirs == "attention_factor" and rope.get(theirs) is not None)
    }
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and all_dim and rope["attention_factor"] is None:
        log = 0.1 * math.log(max(rope["factor"], 1.0))
        scaled["yarn_attention_factor"] = (mscale * log + 1) / (all_dim * log + 1)
    is_length = lambda ours: ours == "rope_original_max_positions"  # noqa: E731
    scaled = {ours: value if is_length(ours) else float(value) for ours, value in scaled.items()}
    return {**options, "rope_scaling_type": rope["rope_type"], **scaled}


def multipliers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the native options of Granite's factors."""
    return {name: float(config[name]) for name in MULTIPLIERS}


def written_multipliers(model: ModelConfig) -> dict[str, Any]:
    """Returns the entries of Granite's factors, whose factor on scores has no other default than 1."""
    factors = {name: getattr(model, name) for name in MULTIPLIERS}
    return {name: model.head_dim**-0.5 if value is None else value for name, value in factors.items()}


def read_biases(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the native options of attention_bias, of all of attention's projections, and mlp_bias."""
    attention, mlp = config["attention_bias"], config.get("mlp_bias", False)
    return {"disable_bias_linear": not mlp, **({} if attention == mlp else {"attention_bias": attention})}


def window(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the native options of a window in every layer."""
    return {} if config["sliding_window"] is None else {"sliding_window": config["sliding_window"]}


def window_by_layer(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the native options of a window in the layers that layer_types or max_window_layers name.

    Raises:
        ConfigError: it is in some layers, and not in all but every N-th; or it is missing, and layers ask for it.
    """
    layers, size = config["num_hidden_layers"], config["sliding_window"] if config["use_sliding_window"] else None
    kinds = config["layer_types"]
    if kinds is None:
        first = layers if size is None else config["max_window_layers"]
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if len(kinds) != layers or not {"full_attention", "sliding_attention"}.issuperset(kinds):
        raise wrong_entry("layer_types", kinds, "must name full_attention or sliding_attention for each layer")
    if "sliding_attention" not in kinds:
        return {}
    if size is None:
        raise wrong_entry(
            "layer_types", kinds, "has sliding_attention, which needs use_sliding_window and sliding_window"
        )
    if "full_attention" not in kinds:
        return {"sliding_window": size}
    every = kinds.index("full_attention") + 1
    if every < 2 or kinds != written_layer_types(layers, every):
        raise wrong_entry(
            "layer_types", kinds, f"{CannotCompute}; a window must be in all layers, or in all but every N-th"
        )
    return {"sliding_window": size, "window_attn_skip_freq": every}


def written_layer_types(num_layers: int, skip: int | None) -> list[str]:
    """Returns layer_types of a model whose every `skip`-th layer has no window, all others one."""
    is_full = [skip is not None and (i + 1) % skip == 0 for i in range(num_layers)]
    return ["full_attention" if full else "sliding_attention" for full in is_full]


def layer_pattern(config: Mapping[str, Any]) -> str:
    """Returns --moe-layer-freq for decoder_sparse_step and mlp_only_layers."""
    step, dense = config["decoder_sparse_step"], config["mlp_only_layers"]
    is_moe = [step > 0 and (i + 1) % step == 0 and i not in dense for i in range(config["num_hidden_layers"])]
    if not any(is_moe):
        raise wrong_entry("decoder_sparse_step", step, "leaves no layer with experts")
    return written_layer_freq(is_moe)
