"""Reading another project's config.json: every entry that changes the function is understood or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_samoe.config.derived import written_layer_freq
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


def rotary_base(config: Mapping[str, Any], default: float) -> float:
    """Returns the base of plain rotary positions over whole heads.

    Raises:
        ConfigError: positions are scaled, or only part of a head is rotated.
    """
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise ConfigError(f"config.json: {key}", rope, "must be a mapping")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"config.json: {key}", kind, f"{CannotCompute}; rope_type must be 'default'")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(f"config.json: {key}", rope, "this class rotates whole heads")
        if "rope_theta" in rope:
            return float(number(rope, "rope_theta"))
    return float(number(config, "rope_theta", default))


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
