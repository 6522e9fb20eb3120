"""Dense descendants of LLaMA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_samoe.convert.hf.families import classes
from megatron_samoe.convert.hf.families.base import Family, needs, whole_heads
from megatron_samoe.convert.hf.families.llama import (
    SHARED_RULES,
    read_shared_config,
    shared_parts,
    write_shared_config,
)
from megatron_samoe.convert.hf.families.reading import (
    multipliers,
    read_biases,
    window,
    window_by_layer,
    written_layer_types,
    written_multipliers,
)
from megatron_samoe.convert.native import NativeModel

#: Endings of tensors that older files hold and that are computed anew.
COMPUTED = ("rotary_emb.inv_freq",)


def _dense(model: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"model": model, "moe": {"expert_layout": "dense"}}


def _write_llama(native: NativeModel) -> dict[str, Any]:
    attention_bias = native.model.attention_output_bias
    return {**write_shared_config(native), "attention_bias": attention_bias, "mlp_bias": native.has_bias}


def _read_llama(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return _dense({**read_shared_config(config), **read_biases(config)})


LLAMA = Family(
    "llama", "LlamaForCausalLM", "dense, RMSNorm, rotary positions, gated SiLU MLPs",
    (needs("expert_layout", "dense"), *SHARED_RULES, needs("qk_layernorm", False), needs("add_qkv_bias", False),
     needs("sliding_window", None), whole_heads),
    _write_llama, shared_parts, classes.LLAMA, _read_llama, COMPUTED, ("attention_bias",),
)  # fmt: skip


GRANITE = Family(
    "granite", "GraniteForCausalLM", "as llama, with factors on embeddings, scores, residuals and logits",
    LLAMA.rules, lambda native: {**_write_llama(native), **written_multipliers(native.model)}, shared_parts, classes.GRANITE,
    lambda config: _dense({**_read_llama(config)["model"], **multipliers(config)}), COMPUTED, ("attention_bias", *classes.MULTIPLIERS),
)  # fmt: skip


def _write_mistral(native: NativeModel) -> dict[str, Any]:
    return {**write_shared_config(native), "sliding_window": native.model.sliding_window}


def _read_mistral(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return _dense({**read_shared_config(config), **window(config)})


MISTRAL = Family(
    "mistral", "MistralForCausalLM", "as llama without biases, with a window of recent tokens in every layer",
    (needs("expert_layout", "dense"), *SHARED_RULES, needs("qk_layernorm", False), needs("disable_bias_linear", True),
     needs("add_qkv_bias", False), needs("window_attn_skip_freq", None)),
    _write_mistral, shared_parts, classes.MISTRAL, _read_mistral, COMPUTED,
)  # fmt: skip


def _window_entries(native: NativeModel) -> dict[str, Any]:
    model = native.model
    if model.sliding_window is None:
        return {"use_sliding_window": False}
    kinds = written_layer_types(model.num_layers, model.window_attn_skip_freq)
    return {
        "use_sliding_window": True,
        "sliding_window": model.sliding_window,
        "max_window_layers": 0,
        "layer_types": kinds,
    }


def _write_qwen2(native: NativeModel) -> dict[str, Any]:
    return {**write_shared_config(native), **_window_entries(native)}


def _read_qwen2(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return _dense({**read_shared_config(config), **window_by_layer(config), "add_qkv_bias": True})


QWEN2 = Family(
    "qwen2", "Qwen2ForCausalLM", "as llama, with a bias on queries, keys and values only",
    (needs("expert_layout", "dense"), *SHARED_RULES, needs("qk_layernorm", False), needs("add_qkv_bias", True)),
    _write_qwen2, shared_parts, classes.QWEN2, _read_qwen2, COMPUTED,
)  # fmt: skip


def _write_qwen3(native: NativeModel) -> dict[str, Any]:
    return {**write_shared_config(native), "attention_bias": False, **_window_entries(native)}


def _read_qwen3(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return _dense({**read_shared_config(config), **window_by_layer(config), "qk_layernorm": True})


QWEN3 = Family(
    "qwen3", "Qwen3ForCausalLM", "as llama without biases, with norms of each head's queries and keys",
    (needs("expert_layout", "dense"), *SHARED_RULES, needs("qk_layernorm", True), needs("add_qkv_bias", False),
     needs("qk_layernorm_scope", "head"), needs("disable_bias_linear", True)),
    _write_qwen3, shared_parts, classes.QWEN3, _read_qwen3, COMPUTED,
)  # fmt: skip
