"""Classes that descend from LLaMA: Llama, Qwen2, Qwen3, and with experts Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE.

They share norms (RMSNorm), rotary positions, gated SiLU MLPs and their tensors' names; they differ in biases, in norms
of queries and keys, and in how experts are named, weighed and placed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_samoe.convert.hf.families.base import entries, needs
from megatron_samoe.convert.hf.families.reading import rotary, written_rope
from megatron_samoe.convert.hf.parts import Constant, Part, View, at, keys, queries, rows, values, whole
from megatron_samoe.convert.native import NativeModel
from megatron_samoe.errors import ConfigError

#: What every one of them demands of a native model.
SHARED_RULES = (
    needs("normalization", "RMSNorm"),
    needs("swiglu", True),
    needs("position_embedding_type", "rope"),
    needs("rotary_percent", 1.0),
)


LayerParts = Callable[[NativeModel, str, str], Iterator[Part | Constant]]


@dataclass(frozen=True)
class ExpertNames:
    """How a family names the tensors of an MoE layer.

    Attributes:
        block: what stands in place of "mlp".
        gate, up, down: matrices of one expert.
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class StackNames:
    """How a family names the tensors of an MoE layer that keeps all its experts in one tensor of each kind.

    Attributes:
        block: what stands in place of "mlp".
        router: of the layer.
        up: gates and then up projections of every expert, [E, 2 F, H].
        down: [E, H, F].
    """

    block: str
    router: str
    up: str
    down: str


def write_shared_config(native: NativeModel) -> dict[str, Any]:
    """Returns the entries that all of them share."""
    model = native.model
    return {
        **entries(native),
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        **written_rope(model),
    }


def read_shared_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the native model's options of completed entries; ConfigError where there is something that it cannot compute."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rope = rotary(config)
    if rope["rotary_percent"] != 1.0:
        raise ConfigError(
            "config.json: partial_rotary_factor", rope["rotary_percent"], "this class rotates whole heads"
        )
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "kv_channels": config.get("head_dim", config["hidden_size"] // heads),
        "group_query_attention": kv_heads != heads,
        "num_query_groups": kv_heads if kv_heads != heads else 1,
        "seq_length": config["max_position_embeddings"],
        "position_embedding_type": "rope",
        **rope,
        "normalization": "RMSNorm",
        "norm_epsilon": float(config["rms_norm_eps"]),
        "swiglu": True,
        "disable_bias_linear": True,
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "init_method_std": float(config["initializer_range"]),
        "attention_dropout": float(config["attention_dropout"]),
    }


def shared_parts(
    native: NativeModel, experts: ExpertNames | StackNames | None = None, shared_expert: LayerParts | None = None,
    attention: LayerParts | None = None,
) -> Iterator[Part | Constant]:  # fmt: skip
    """Yields a model's tensors in the order of its layers.

    Args:
        shared_expert: yields those of the expert that every token passes, for the names of their layer and of ours.
        attention: likewise; a projection each for queries, keys and values if not given.
    """
    model = native.model
    embedding = (native.vocab_size, model.hidden_size)
    yield Part("model.embed_tokens.weight", "embedding.word.weight", rows(native.vocab_size), embedding)
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        yield norm_part(f"{theirs}.input_layernorm", f"{ours}.attention_norm", model.hidden_size)
        yield from (attention or attention_parts)(native, f"{theirs}.self_attn", f"{ours}.attention")
        yield norm_part(f"{theirs}.post_attention_layernorm", f"{ours}.mlp_norm", model.hidden_size)
        if not native.is_moe[layer]:
            yield from gated_mlp(f"{theirs}.mlp", f"{ours}.mlp", model.hidden_size, model.mlp_size, native.has_bias)
            continue
        assert experts is not None
        place = f"{theirs}.{experts.block}", f"{ours}.moe"
        yield from (
            _stack(native, *place, experts) if isinstance(experts, StackNames) else _experts(native, *place, experts)
        )
        if shared_expert is not None:
            yield from shared_expert(native, f"{theirs}.{experts.block}", f"{ours}.moe")
    yield norm_part("model.norm", "final_norm", model.hidden_size)
    if model.untie_embeddings_and_output_weights:
        yield Part("lm_head.weight", "output.weight", rows(native.vocab_size), embedding)


def norm_part(theirs: str, ours: str, size: int) -> Part:
    """Returns the weight of an RMSNorm."""
    return Part(f"{theirs}.weight", f"{ours}.weight", whole, (size,))


def attention_parts(native: NativeModel, theirs: str, ours: str) -> Iterator[Part]:
    """Yields the tensors of attention with a projection each for queries, keys and values."""
    model = native.model
    width, kv_width = model.num_attention_heads * model.head_dim, model.num_kv_heads * model.head_dim
    projections: tuple[tuple[str, View, int], ...] = (
        ("q_proj", queries, width), ("k_proj", keys, kv_width), ("v_proj", values, kv_width)
    )  # fmt: skip
    for name, view, size in projections:
        yield Part(f"{theirs}.{name}.weight", f"{ours}.qkv.weight", view, (size, model.hidden_size))
    if model.qkv_bias:
        for name, view, size in projections:
            yield Part(f"{theirs}.{name}.bias", f"{ours}.qkv.bias", view, (size,))
    yield Part(f"{theirs}.o_proj.weight", f"{ours}.output.weight", whole, (model.hidden_size, width))
    if model.attention_output_bias:
        yield Part(f"{theirs}.o_proj.bias", f"{ours}.output.bias", whole, (model.hidden_size,))
    if model.qk_layernorm:
        of_all = model.qk_layernorm_scope == "all"
        for name, size in (("q_norm", width), ("k_norm", kv_width)):
            yield norm_part(f"{theirs}.{name}", f"{ours}.{name}", size if of_all else model.head_dim)


def gated_mlp(
    theirs: str, ours: str, hidden: int, width: int, bias: bool, down_scale: float = 1.0, names: ExpertNames = ExpertNames()
) -> Iterator[Part]:  # fmt: skip
    """Yields the tensors of a gated MLP that every token passes."""
    for index, name in enumerate((names.gate, names.up)):
        yield Part(f"{theirs}.{name}.weight", f"{ours}.fc1.weight", at(index), (width, hidden))
    if bias:
        for index, name in enumerate((names.gate, names.up)):
            yield Part(f"{theirs}.{name}.bias", f"{ours}.fc1.bias", at(index), (width,))
    yield Part(f"{theirs}.{names.down}.weight", f"{ours}.fc2.weight", whole, (hidden, width), down_scale)
    if bias:
        yield Part(f"{theirs}.{names.down}.bias", f"{ours}.fc2.bias", whole, (hidden,), down_scale)


def _experts(native: NativeModel, theirs: str, ours: str, names: ExpertNames) -> Iterator[Part]:
    hidden, width, count = native.model.hidden_size, native.expert_size, native.moe.most_experts
    yield Part(f"{theirs}.gate.weight", f"{ours}.router.weight", whole, (count, hidden))
    for expert in range(count):
        for index, name in enumerate((names.gate, names.up)):
            full = f"{theirs}.experts.{expert}.{name}.weight"
            yield Part(full, f"{ours}.experts.w1", at(expert, index), (width, hidden))
    for expert in range(count):
        yield Part(f"{theirs}.experts.{expert}.{names.down}.weight", f"{ours}.experts.w2", at(expert), (hidden, width))


def _stack(native: NativeModel, theirs: str, ours: str, names: StackNames) -> Iterator[Part]:
    hidden, width, count = native.model.hidden_size, native.expert_size, native.moe.most_experts
    yield Part(f"{theirs}.{names.router}.weight", f"{ours}.router.weight", whole, (count, hidden))
    yield Part(f"{theirs}.{names.up}.weight", f"{ours}.experts.w1", whole, (count, 2 * width, hidden))
    yield Part(f"{theirs}.{names.down}.weight", f"{ours}.experts.w2", whole, (count, hidden, width))
