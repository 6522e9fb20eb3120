"""Classes of GPT-2's descent: LayerNorm, GELU MLPs and biases everywhere; learned positions, or rotary (GPT-NeoX)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_samoe.config.model import ModelConfig
from megatron_samoe.convert.hf.families import classes
from megatron_samoe.convert.hf.families.base import Family, entries, needs, plain_heads
from megatron_samoe.convert.hf.families.entries import CannotCompute
from megatron_samoe.convert.hf.families.reading import rotary
from megatron_samoe.convert.hf.parts import Part, rows, transposed, whole
from megatron_samoe.convert.native import NativeModel
from megatron_samoe.errors import ConfigError

_RULES = (
    needs("expert_layout", "dense"), needs("normalization", "LayerNorm"), needs("swiglu", False),
    needs("disable_bias_linear", False), needs("qk_layernorm", False), needs("sliding_window", None), needs("group_query_attention", False),
    plain_heads,
)  # fmt: skip


def _query_first(t: Tensor) -> Tensor:
    """From a fused projection [A, 3, D, ...] to [3, A, D, ...], all queries before all keys before all values."""
    return t.transpose(0, 1)


def _query_first_by_input(t: Tensor) -> Tensor:
    """The same for a weight [A, 3, D, H], with its inputs first: GPT-2 stores the transpose."""
    return t.permute(3, 1, 0, 2)


def _norm(theirs: str, ours: str, size: int) -> Iterator[Part]:
    for kind in ("weight", "bias"):
        yield Part(f"{theirs}.{kind}", f"{ours}.{kind}", whole, (size,))


def _gelu(model: ModelConfig) -> str:
    return "gelu" if model.exact_gelu else "gelu_new"


def _write_gpt2(native: NativeModel) -> dict[str, Any]:
    model = native.model
    return {
        "vocab_size": native.vocab_size, "n_positions": model.max_positions, "n_embd": model.hidden_size,
        "n_layer": model.num_layers, "n_head": model.num_attention_heads, "n_inner": model.mlp_size,
        "activation_function": _gelu(model), "resid_pdrop": model.hidden_dropout, "embd_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout, "layer_norm_epsilon": model.norm_epsilon,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
    }  # fmt: skip


@dataclass(frozen=True)
class _Names:
    """How a class names its tensors.

    Attributes:
        embedding, final_norm, head: outside the layers.
        layer: what a layer's names begin with, with its number left open.
        norms: before attention and before the MLP.
        attention, mlp: a layer's linear ones, in and out.
        is_transposed: whether weights have their inputs first, and queries stand before all keys and values.
    """

    embedding: str
    final_norm: str
    head: str
    layer: str
    norms: tuple[str, str]
    attention: tuple[str, str]
    mlp: tuple[str, str]
    is_transposed: bool = False


def _parts(native: NativeModel, names: _Names) -> Iterator[Part]:
    model = native.model
    hidden, width, embedding = model.hidden_size, model.mlp_size, (native.vocab_size, model.hidden_size)

    def linear(
        theirs: str, ours: str, inputs: int, outputs: int, is_qkv: bool = False, has_bias: bool = True
    ) -> Iterator[Part]:
        weight, bias, shape = whole, whole, (outputs, inputs)
        if names.is_transposed:
            weight, bias, shape = transposed, whole, (inputs, outputs)
            if is_qkv:
                weight, bias = _query_first_by_input, _query_first
        yield Part(f"{theirs}.weight", f"{ours}.weight", weight, shape)
        if has_bias:
            yield Part(f"{theirs}.bias", f"{ours}.bias", bias, (outputs,))

    yield Part(names.embedding, "embedding.word.weight", rows(native.vocab_size), embedding)
    if model.position_embedding_type == "learned_absolute":
        yield Part("transformer.wpe.weight", "embedding.position", whole, (model.max_positions, hidden))
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", names.layer.format(layer)
        for own, name in zip(("attention_norm", "mlp_norm"), names.norms, strict=True):
            yield from _norm(f"{theirs}.{name}", f"{ours}.{own}", hidden)
        # A fused projection goes head by head, as ours does, unless queries stand first.
        (qkv, output), has_bias = names.attention, model.attention_output_bias
        yield from linear(f"{theirs}.{qkv}", f"{ours}.attention.qkv", hidden, 3 * hidden, True, has_bias)
        yield from linear(f"{theirs}.{output}", f"{ours}.attention.output", hidden, hidden, has_bias=has_bias)
        yield from linear(f"{theirs}.{names.mlp[0]}", f"{ours}.mlp.fc1", hidden, width)
        yield from linear(f"{theirs}.{names.mlp[1]}", f"{ours}.mlp.fc2", width, hidden)
    yield from _norm(names.final_norm, "final_norm", hidden)
    if model.untie_embeddings_and_output_weights:
        yield Part(names.head, "output.weight", rows(native.vocab_size), embedding)


_GPT2 = _Names("transformer.wte.weight", "transformer.ln_f", "lm_head.weight", "transformer.h.{}", ("ln_1", "ln_2"),
               ("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj"), is_transposed=True)  # fmt: skip
_NEOX = _Names("gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm", "embed_out.weight", "gpt_neox.layers.{}",
               ("input_layernorm", "post_attention_layernorm"), ("attention.query_key_value", "attention.dense"),
               ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"))  # fmt: skip


def _read_gpt2(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    residual, embedding = config["resid_pdrop"], config["embd_pdrop"]
    if residual != embedding:
        raise ConfigError("config.json: resid_pdrop, embd_pdrop", (residual, embedding),
                          "our --hidden-dropout is one for both; make them equal")  # fmt: skip
    return _gpt(
        config, config["layer_norm_epsilon"], config["activation_function"], num_layers=config["n_layer"], hidden_size=config["n_embd"],
        num_attention_heads=config["n_head"], ffn_hidden_size=config["n_inner"], seq_length=config["n_positions"],
        max_position_embeddings=config["n_positions"], attention_dropout=float(config["attn_pdrop"]), hidden_dropout=float(residual),
    )  # fmt: skip


def _gpt(config: Mapping[str, Any], epsilon: float, activation: str, **model: Any) -> dict[str, dict[str, Any]]:
    shared = {
        "norm_epsilon": float(epsilon), "init_method_std": float(config["initializer_range"]), "exact_gelu": activation == "gelu",
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
    }  # fmt: skip
    return {"model": {**shared, **model}, "moe": {"expert_layout": "dense"}}


GPT2 = Family(
    "gpt2", "GPT2LMHeadModel", "dense, LayerNorm, learned positions, GELU MLPs, biases everywhere",
    (*_RULES, needs("position_embedding_type", "learned_absolute")),
    _write_gpt2, lambda native: _parts(native, _GPT2), classes.GPT2, _read_gpt2, (".attn.bias", ".attn.masked_bias"), ("exact_gelu",),
)  # fmt: skip


def _write_neox(native: NativeModel) -> dict[str, Any]:
    model = native.model
    rope = {"rope_theta": model.rotary_base, "partial_rotary_factor": model.rotary_percent}
    return {
        **{name: value for name, value in entries(native).items() if name not in ("head_dim", "num_key_value_heads")},
        "hidden_act": _gelu(model), "hidden_dropout": model.hidden_dropout, "layer_norm_eps": model.norm_epsilon,
        "use_parallel_residual": model.use_parallel_residual,
        "attention_bias": model.attention_output_bias, "rotary_emb_base": model.rotary_base, "rotary_pct": model.rotary_percent,
        "rope_parameters": {"rope_type": "default", **rope},
    }  # fmt: skip


def _read_neox(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    rope = rotary(config, "rotary_emb_base", "rotary_pct")
    if kind := rope.get("rope_scaling_type"):
        raise ConfigError("config.json: rope_parameters", kind, f"{CannotCompute}; rope_type must be 'default'")
    return _gpt(
        config, config["layer_norm_eps"], config["hidden_act"], num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"], num_attention_heads=config["num_attention_heads"],
        ffn_hidden_size=config["intermediate_size"], seq_length=config["max_position_embeddings"], position_embedding_type="rope",
        **rope, attention_dropout=float(config["attention_dropout"]), hidden_dropout=float(config["hidden_dropout"]),
        use_parallel_residual=config["use_parallel_residual"],
        **({} if config["attention_bias"] else {"attention_bias": False}),
    )  # fmt: skip


GPT_NEOX = Family(
    "gpt_neox", "GPTNeoXForCausalLM", "as gpt2, with rotary positions; attention and MLP one after the other or side by side",
    (*_RULES, needs("position_embedding_type", "rope"), needs("rope_scaling_type", None)),
    _write_neox, lambda native: _parts(native, _NEOX), classes.GPT_NEOX, _read_neox,
    ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"), ("exact_gelu", "use_parallel_residual", "attention_bias"),
)  # fmt: skip
