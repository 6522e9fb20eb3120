"""Classes of GPT-2's descent: LayerNorm, GELU MLPs and biases everywhere; learned positions, or rotary (GPT-NeoX)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megatron_samoe.convert.hf.families.base import SIZES, WORDS, Family, Option, plain_heads, same
from megatron_samoe.convert.hf.families.entries import CannotCompute, entries_of, wrong_entry
from megatron_samoe.convert.hf.families.reading import rotary
from megatron_samoe.convert.hf.parts import Row, below, by_input, module, modules, transposed
from megatron_samoe.convert.native import NativeModel

_FIXED = {
    "expert_layout": "dense",
    "normalization": "LayerNorm",
    "swiglu": False,
    "disable_bias_linear": False,
    "qk_layernorm": False,
    "sliding_window": None,
    "group_query_attention": False,
}


def gelu(theirs: str) -> Option:
    """Returns the line of an entry that names one of GELU's two forms."""
    return Option(
        lambda native: {theirs: "gelu" if native.model.exact_gelu else "gelu_new"},
        lambda config: {"exact_gelu": config[theirs] == "gelu"},
    )


def _query_first(t: Tensor) -> Tensor:
    """From a fused projection [A, 3, D, ...] to [3, A, D, ...], all queries before all keys before all values."""
    return t.transpose(0, 1)


def _query_first_by_input(t: Tensor) -> Tensor:
    """The same for a weight [A, 3, D, H], with its inputs first: GPT-2 stores the transpose."""
    return t.permute(3, 1, 0, 2)


def _written_dropout(native: NativeModel) -> dict[str, Any]:
    return {"resid_pdrop": native.model.hidden_dropout, "embd_pdrop": native.model.hidden_dropout}


def _read_dropout(config: Mapping[str, Any]) -> dict[str, Any]:
    residual, embedding = config["resid_pdrop"], config["embd_pdrop"]
    if residual != embedding:
        raise wrong_entry(
            "resid_pdrop, embd_pdrop", (residual, embedding), "our --hidden-dropout is one for both; make them equal"
        )
    return {"hidden_dropout": float(residual)}


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    "dense, LayerNorm, learned positions, GELU MLPs, biases everywhere",
    tensors=(
        Row("transformer.wte.weight", "embedding.word.weight"),
        Row("transformer.wpe.weight", "embedding.position"),
        *modules("transformer.h.{layer}", "layers.{layer}", ("ln_1", "attention_norm"), ("ln_2", "mlp_norm")),
        *below(
            "transformer.h.{layer}",
            "layers.{layer}",
            ("attn.c_attn.weight", "attention.qkv.weight", _query_first_by_input, by_input),
            ("attn.c_attn.bias", "attention.qkv.bias", _query_first),
            ("attn.c_proj.weight", "attention.output.weight", transposed),
            ("attn.c_proj.bias", "attention.output.bias"),
            ("mlp.c_fc.weight", "mlp.fc1.weight", transposed),
            ("mlp.c_fc.bias", "mlp.fc1.bias"),
            ("mlp.c_proj.weight", "mlp.fc2.weight", transposed),
            ("mlp.c_proj.bias", "mlp.fc2.bias"),
        ),
        *module("transformer.ln_f", "final_norm"),
        Row("lm_head.weight", "output.weight"),
    ),
    entries=entries_of("gpt2"),
    options=(
        *WORDS,
        same("n_positions", "seq_length", written="max_positions"),
        Option(lambda native: {}, lambda config: {"max_position_embeddings": config["n_positions"]}),
        same("n_embd", "hidden_size"),
        same("n_layer", "num_layers"),
        same("n_head", "num_attention_heads"),
        same("n_inner", "ffn_hidden_size", written="mlp_size"),
        gelu("activation_function"),
        Option(_written_dropout, _read_dropout),
        same("attn_pdrop", "attention_dropout", float),
        same("layer_norm_epsilon", "norm_epsilon", float),
        same("initializer_range", "init_method_std", float),
    ),
    fixed={**_FIXED, "position_embedding_type": "learned_absolute"},
    rules=(plain_heads,),
    ignored=(".attn.bias", ".attn.masked_bias"),
    knows=("exact_gelu",),
)


def _written_rotary(native: NativeModel) -> dict[str, Any]:
    base, share = native.model.rotary_base, native.model.rotary_percent
    rope = {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": share}
    return {"rotary_emb_base": base, "rotary_pct": share, "rope_parameters": rope}


def _read_rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = rotary(config, "rotary_emb_base", "rotary_pct")
    if kind := rope.get("rope_scaling_type"):
        raise wrong_entry("rope_parameters", kind, f"{CannotCompute}; rope_type must be 'default'")
    return rope


GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    "as gpt2, with rotary positions; attention and MLP one after the other or side by side",
    tensors=(
        Row("gpt_neox.embed_in.weight", "embedding.word.weight"),
        *modules(
            "gpt_neox.layers.{layer}",
            "layers.{layer}",
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "mlp_norm"),
            ("attention.query_key_value", "attention.qkv"),
            ("attention.dense", "attention.output"),
            ("mlp.dense_h_to_4h", "mlp.fc1"),
            ("mlp.dense_4h_to_h", "mlp.fc2"),
        ),
        *module("gpt_neox.final_layer_norm", "final_norm"),
        Row("embed_out.weight", "output.weight"),
    ),
    entries=entries_of("gpt_neox"),
    options=(
        *SIZES,
        gelu("hidden_act"),
        same("hidden_dropout", kind=float),
        same("layer_norm_eps", "norm_epsilon", float),
        same("use_parallel_residual"),
        Option(
            lambda native: {"attention_bias": native.model.attention_output_bias},
            lambda config: {} if config["attention_bias"] else {"attention_bias": False},
        ),
        Option(_written_rotary, _read_rotary),
    ),
    fixed={**_FIXED, "position_embedding_type": "rope", "rope_scaling_type": None},
    rules=(plain_heads,),
    ignored=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
    knows=("exact_gelu", "use_parallel_residual", "attention_bias"),
)
