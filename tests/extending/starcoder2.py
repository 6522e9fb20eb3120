"""A family of files: StarCoder2 (Lozhkov et al., arXiv:2402.19173): LayerNorm and biases with rotary positions.

The package that holds it names FAMILY as an entry point of the group "megatron_samoe.hf_families".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_samoe.convert.hf.families.base import Family, entries, needs
from megatron_samoe.convert.hf.families.entries import Entries, may, only
from megatron_samoe.convert.hf.families.llama import attention_parts
from megatron_samoe.convert.hf.families.reading import rotary, window, written_rope
from megatron_samoe.convert.hf.parts import Part, rows, whole
from megatron_samoe.convert.native import NativeModel

#: Our options and their names in config.json; heads of one size are taken for granted.
SIZES = {"num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size",
         "num_attention_heads": "num_attention_heads", "num_query_groups": "num_key_value_heads"}  # fmt: skip
FIXED = {"normalization": "LayerNorm", "swiglu": False, "disable_bias_linear": False, "position_embedding_type": "rope",
         "rotary_percent": 1.0, "qk_layernorm": False, "group_query_attention": True, "window_attn_skip_freq": None}  # fmt: skip


#: The class's own defaults; entries that are not here are refused.
ENTRIES = Entries({
    "vocab_size": 49152, "hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 30, "num_attention_heads": 24,
    "num_key_value_heads": 2, "head_dim": may(int), "hidden_act": only("gelu_pytorch_tanh"), "max_position_embeddings": 4096,
    "initializer_range": 0.018042, "norm_epsilon": 1e-5, "tie_word_embeddings": True, "use_bias": only(True),
    "attention_dropout": 0.0, "residual_dropout": only(0.0), "embedding_dropout": only(0.0), "sliding_window": may(int),
    "rope_theta": 10000.0, "rope_parameters": may(dict), "rope_scaling": may(dict), "partial_rotary_factor": only(None),
})  # fmt: skip


def read(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    model = {ours: config[theirs] for ours, theirs in SIZES.items()}
    model |= {**FIXED, **rotary(config), **window(config), "norm_epsilon": float(config["norm_epsilon"]),
              "seq_length": config["max_position_embeddings"], "attention_dropout": float(config["attention_dropout"]),
              "untie_embeddings_and_output_weights": not config["tie_word_embeddings"]}  # fmt: skip
    return {"model": model, "moe": {"expert_layout": "dense"}}


def write(native: NativeModel) -> dict[str, Any]:
    model = native.model
    return {**entries(native), **written_rope(model), "hidden_act": "gelu_pytorch_tanh", "use_bias": True,
            "norm_epsilon": model.norm_epsilon, "sliding_window": model.sliding_window}  # fmt: skip


def parts(native: NativeModel) -> Iterator[Part]:
    hidden, width = native.model.hidden_size, native.model.mlp_size
    table = (native.vocab_size, hidden)

    def pair(theirs: str, ours: str, *weight: int) -> Iterator[Part]:
        yield Part(f"{theirs}.weight", f"{ours}.weight", whole, weight)
        yield Part(f"{theirs}.bias", f"{ours}.bias", whole, weight[:1])

    yield Part("model.embed_tokens.weight", "embedding.word.weight", rows(native.vocab_size), table)
    for layer in range(native.model.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        yield from pair(f"{theirs}.input_layernorm", f"{ours}.attention_norm", hidden)
        yield from attention_parts(native, f"{theirs}.self_attn", f"{ours}.attention")
        yield from pair(f"{theirs}.post_attention_layernorm", f"{ours}.mlp_norm", hidden)
        yield from pair(f"{theirs}.mlp.c_fc", f"{ours}.mlp.fc1", width, hidden)
        yield from pair(f"{theirs}.mlp.c_proj", f"{ours}.mlp.fc2", hidden, width)
    yield from pair("model.norm", "final_norm", hidden)
    if native.model.untie_embeddings_and_output_weights:
        yield Part("lm_head.weight", "output.weight", rows(native.vocab_size), table)


RULES = (needs("expert_layout", "dense"), *(needs(option, value) for option, value in FIXED.items()))
FAMILY = Family("starcoder2", "Starcoder2ForCausalLM", "dense, LayerNorm, rotary positions, biases everywhere", RULES,
                write, parts, ENTRIES, read)  # fmt: skip
