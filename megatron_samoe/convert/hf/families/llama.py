"""Classes that descend from LLaMA: RMSNorm, rotary positions, gated SiLU MLPs; here those without experts.

They differ in biases, in norms of queries and keys, and in windows; with experts (`experts`) in how these are named, weighed and
placed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_samoe.convert.hf.families.base import HEADS, SIZES, Family, Option, always, constant, same, whole_heads
from megatron_samoe.convert.hf.families.entries import entries_of, wrong_entry
from megatron_samoe.convert.hf.families.reading import (
    MULTIPLIERS,
    multipliers,
    read_biases,
    rotary,
    window,
    window_by_layer,
    written_layer_types,
    written_multipliers,
    written_rope,
)
from megatron_samoe.convert.hf.parts import Row, at, keys, modules, queries, values
from megatron_samoe.convert.native import NativeModel

ATTENTION = modules(
    "model.layers.{layer}.self_attn",
    "layers.{layer}.attention",
    ("q_proj", "qkv", queries),
    ("k_proj", "qkv", keys),
    ("v_proj", "qkv", values),
    ("o_proj", "output"),
    ("q_norm", "q_norm"),
    ("k_norm", "k_norm"),
)


def gated(
    theirs: str,
    ours: str,
    down: tuple[Any, ...] = (),
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Row, ...]:
    """Returns the lines of a gated MLP that every token passes; `down` is more of the second matrix's."""
    gate, up, last = names
    return modules(theirs, ours, (gate, "fc1", at(0)), (up, "fc1", at(1)), (last, "fc2", *down))


def plain(theirs: str, ours: str, names: tuple[str, str, str] = ("", "up_proj", "down_proj")) -> tuple[Row, ...]:
    """Returns the lines of an MLP without gates, whose names are the last two."""
    return modules(theirs, ours, (names[1], "fc1"), (names[2], "fc2"))


def tensors(*moe: Any, attention: tuple[Row, ...] = ATTENTION) -> tuple[Any, ...]:
    """Returns the lines of a class; `moe` are those of layers with experts."""
    return (
        Row("model.embed_tokens.weight", "embedding.word.weight"),
        Row("model.layers.{layer}.input_layernorm.weight", "layers.{layer}.attention_norm.weight"),
        *attention,
        Row("model.layers.{layer}.post_attention_layernorm.weight", "layers.{layer}.mlp_norm.weight"),
        *gated("model.layers.{layer}.mlp", "layers.{layer}.mlp"),
        *moe,
        Row("model.norm.weight", "final_norm.weight"),
        Row("lm_head.weight", "output.weight"),
    )


#: What every one of them computes by.
FIXED = {"normalization": "RMSNorm", "swiglu": True, "position_embedding_type": "rope", "rotary_percent": 1.0}
DENSE = {"expert_layout": "dense", **FIXED}
_NO_BIASES = {"disable_bias_linear": True, "add_qkv_bias": False}


def _whole_rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = rotary(config)
    if rope["rotary_percent"] != 1.0:
        raise wrong_entry("partial_rotary_factor", rope["rotary_percent"], "this class rotates whole heads")
    return rope


ROPE = Option(lambda native: written_rope(native.model), _whole_rotary)
OPTIONS = (
    *SIZES,
    *HEADS,
    constant(hidden_act="silu"),
    same("rms_norm_eps", "norm_epsilon", float),
    ROPE,
    always(disable_bias_linear=True),
)
BIASES = Option(
    lambda native: {"attention_bias": native.model.attention_output_bias, "mlp_bias": native.has_bias}, read_biases
)
FACTORS = Option(lambda native: written_multipliers(native.model), multipliers)
WINDOW = Option(lambda native: {"sliding_window": native.model.sliding_window}, window)


def _written_window(native: NativeModel) -> dict[str, Any]:
    model = native.model
    if model.sliding_window is None:
        return {"use_sliding_window": False}
    kinds = written_layer_types(model.num_layers, model.window_attn_skip_freq)
    window = {"use_sliding_window": True, "sliding_window": model.sliding_window, "max_window_layers": 0}
    return {**window, "layer_types": kinds}


WINDOW_BY_LAYER = Option(_written_window, window_by_layer)

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    "dense, RMSNorm, rotary positions, gated SiLU MLPs",
    tensors=tensors(),
    entries=entries_of("llama"),
    options=(*OPTIONS, BIASES),
    fixed={**DENSE, "qk_layernorm": False, "add_qkv_bias": False, "sliding_window": None},
    rules=(whole_heads,),
    knows=("attention_bias",),
)
GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    "as llama, with factors on embeddings, scores, residuals and logits",
    tensors=tensors(),
    entries=entries_of("granite"),
    options=(*OPTIONS, BIASES, FACTORS),
    fixed=LLAMA.fixed,
    rules=LLAMA.rules,
    knows=("attention_bias", *MULTIPLIERS),
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    "as llama without biases, with a window of recent tokens in every layer",
    tensors=tensors(),
    entries=entries_of("mistral"),
    options=(*OPTIONS, WINDOW),
    fixed={**DENSE, **_NO_BIASES, "qk_layernorm": False, "window_attn_skip_freq": None},
)

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    "as llama, with a bias on queries, keys and values only",
    tensors=tensors(),
    entries=entries_of("qwen2"),
    options=(*OPTIONS, WINDOW_BY_LAYER),
    fixed={**DENSE, "qk_layernorm": False, "add_qkv_bias": True},
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    "as llama without biases, with norms of each head's queries and keys",
    tensors=tensors(),
    entries=entries_of("qwen3"),
    options=(*OPTIONS, WINDOW_BY_LAYER, constant(attention_bias=False)),
    fixed={**DENSE, **_NO_BIASES, "qk_layernorm": True, "qk_layernorm_scope": "head"},
)
