"""Reading another project's config.json: every entry that changes the function is understood or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_samoe.config.derived import written_layer_freq
from megatron_samoe.config.model import ModelConfig
from megatron_samoe.errors import ConfigError
from megatron_samoe.parsing import finite_float

CannotCompute = "megatron_samoe's model cannot compute it"


def number(config: Mapping[str, Any], key: str, default: int | float | None = None) -> Any:
    """Returns an entry that must be a number; ConfigError where it is missing or something else."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, str) or finite_float(value) is None:
        raise ConfigError(f"config.json: {key}", value, "must be a number")
    return value


def flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """Returns an entry that must be true or false; ConfigError where it is something else."""
    return _entry(config, key, default, lambda value: isinstance(value, bool), "true or false")


def mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Returns an entry that must be a mapping, empty if it is not there; ConfigError where it is something else."""
    return _entry(config, key, {}, lambda value: isinstance(value, Mapping), "a mapping")


def listed(config: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    """Returns an entry that must be a list of texts or of whole numbers; ConfigError where it is something else."""
    words = {str: "texts", int: "whole numbers"}[kind]
    is_legal = lambda value: isinstance(value, list) and all(type(entry) is kind for entry in value)  # noqa: E731
    return _entry(config, key, [], is_legal, f"a list of {words}")


def _entry(config: Mapping[str, Any], key: str, default: Any, is_legal: Callable[[Any], bool], words: str) -> Any:
    value = config.get(key)
    if value is not None and not is_legal(value):
        raise ConfigError(f"config.json: {key}", value, f"must be {words}")
    return default if value is None else value


def demand(config: Mapping[str, Any], key: str, allowed: tuple[object, ...], default: object = None) -> None:
    """Raises ConfigError where an entry has a value that our model cannot compute."""
    value = config.get(key, default)
    if value not in allowed:
        legal = " or ".join(repr(a) for a in allowed)
        raise ConfigError(f"config.json: {key}", value, f"{CannotCompute}; it must be {legal}")


#: Entries of scaled positions by kind: theirs and ours. Kinds and entries that are not here are refused.
_ROPE_ENTRIES: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "linear": {"factor": "rope_scaling_factor"},
    "llama3": {
        "factor": "rope_scaling_factor", "original_max_position_embeddings": "rope_original_max_positions",
        "low_freq_factor": "rope_low_freq_factor", "high_freq_factor": "rope_high_freq_factor",
    },
    "yarn": {
        "factor": "rope_scaling_factor", "original_max_position_embeddings": "rope_original_max_positions",
        "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attention_factor",
    },
}  # fmt: skip


def written_rope(model: ModelConfig) -> dict[str, Any]:
    """Returns the entries of rotary positions over whole heads."""
    kind = model.rope_scaling_type or "default"
    given = {theirs: getattr(model, ours) for theirs, ours in _ROPE_ENTRIES[kind].items()}
    rope = {"rope_type": kind, **{name: value for name, value in given.items() if value is not None}}
    # Both the names that transformers 4 knows and the one of transformers 5.
    old = {} if kind == "default" else {"rope_scaling": rope}
    return {
        "rope_theta": model.rotary_base, **old, "rope_parameters": {**rope, "rope_theta": model.rotary_base}
    }  # fmt: skip


def rotary(config: Mapping[str, Any], default: float) -> dict[str, Any]:
    """Returns the native options of rotary positions over whole heads.

    Raises:
        ConfigError: positions are scaled in a way that we do not know, or only part of a head is rotated.
    """
    options: dict[str, Any] = {"rotary_base": float(number(config, "rope_theta", default))}
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise ConfigError(f"config.json: {key}", rope, "must be a mapping")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in _ROPE_ENTRIES:
            kinds = ", ".join(map(repr, _ROPE_ENTRIES))
            raise ConfigError(f"config.json: {key}", kind, f"{CannotCompute}; rope_type must be one of {kinds}")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(f"config.json: {key}", rope, "this class rotates whole heads")
        if "rope_theta" in rope:
            options["rotary_base"] = float(number(rope, "rope_theta"))
        entries = _ROPE_ENTRIES[kind]
        common = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        unknown = [name for name, value in rope.items() if name not in {*common, *entries} and value is not None]
        if unknown and kind != "default":
            raise ConfigError(
                f"config.json: {key}", unknown, f"{CannotCompute}; entries of {kind} are {', '.join(entries)}"
            )
        if kind == "default":
            continue
        options["rope_scaling_type"] = kind
        for theirs, ours in entries.items():
            if rope.get(theirs) is not None:
                value = number(rope, theirs)
                options[ours] = value if ours == "rope_original_max_positions" else float(value)
    return options


#: Factors of Granite's classes, which our options have the names of.
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


def multipliers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the native options of Granite's factors; each is 1 where the entry is missing."""
    return {name: float(number(config, name, 1.0)) for name in MULTIPLIERS}


def written_multipliers(model: ModelConfig) -> dict[str, Any]:
    """Returns the entries of Granite's factors, whose factor on scores has no other default than 1."""
    factors = {name: getattr(model, name) for name in MULTIPLIERS}
    return {name: model.head_dim**-0.5 if value is None else value for name, value in factors.items()}


def read_biases(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the native options of attention_bias, of all of attention's projections, and mlp_bias."""
    attention, mlp = flag(config, "attention_bias"), flag(config, "mlp_bias")
    return {"disable_bias_linear": not mlp, **({} if attention == mlp else {"attention_bias": attention})}


def no_sliding_window(config: Mapping[str, Any], switch: str | None = None) -> None:
    """Raises ConfigError where attention is limited to a window of recent tokens.

    Args:
        switch: entry that must be true for the window to be in use.
    """
    window = config.get("sliding_window")
    if window and (switch is None or config.get(switch)):
        raise ConfigError("config.json: sliding_window", window, f"{CannotCompute}; it must be null")
    kinds = set(listed(config, "layer_types", str)) - {"full_attention"}
    if kinds:
        raise ConfigError("config.json: layer_types", sorted(kinds), f"{CannotCompute}; only full_attention is known")


def window(config: Mapping[str, Any], default: int | None = None) -> dict[str, Any]:
    """Returns the native options of a window in every layer.

    Args:
        default: the class's, where the entry is missing.
    """
    given = config.get("sliding_window", default)
    return {} if given is None else {"sliding_window": number(config, "sliding_window", default)}


def window_by_layer(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Returns the native options of a window in the layers that layer_types or max_window_layers name.

    Raises:
        ConfigError: it is in some layers, and not in all but every N-th.
    """
    if not flag(config, "use_sliding_window") or config.get("sliding_window") is None:
        return {}
    kinds = listed(config, "layer_types", str)
    if not kinds:
        first = number(config, "max_window_layers", 28)
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]
    if set(kinds) == {"full_attention"}:
        return {}
    options = {"sliding_window": number(config, "sliding_window")}
    if set(kinds) == {"sliding_attention"}:
        return options
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
    if every < 2 or kinds != written_layer_types(num_layers, every):
        raise ConfigError("config.json: layer_types", kinds, f"{CannotCompute}; a window must be in all layers, or in all but "
                          "every N-th")  # fmt: skip
    return {**options, "window_attn_skip_freq": every}


def written_layer_types(num_layers: int, skip: int | None) -> list[str]:
    """Returns layer_types of a model whose every `skip`-th layer has no window, all others one."""
    is_full = [skip is not None and (i + 1) % skip == 0 for i in range(num_layers)]
    return ["full_attention" if full else "sliding_attention" for full in is_full]


def common(config: Mapping[str, Any]) -> None:
    """Raises ConfigError for what no family supports."""
    if config.get("quantization_config") is not None:
        method = config["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, Mapping) else method
        raise ConfigError("config.json: quantization_config", method, "quantized weights cannot be converted; "
                          "load and save them unquantized with transformers first")  # fmt: skip
    if config.get("is_encoder_decoder"):
        raise ConfigError("config.json: is_encoder_decoder", True, "only decoders are known")


def layer_pattern(config: Mapping[str, Any], num_layers: int) -> str:
    """Returns --moe-layer-freq for decoder_sparse_step and mlp_only_layers."""
    step, dense = number(config, "decoder_sparse_step", 1), set(listed(config, "mlp_only_layers", int))
    is_moe = [step > 0 and (i + 1) % step == 0 and i not in dense for i in range(num_layers)]
    if not any(is_moe):
        raise ConfigError("config.json: decoder_sparse_step", step, "leaves no layer with experts")
    return written_layer_freq(is_moe)
