"""Descendants of LLaMA whose layers have experts: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and GraniteMoE.

A router is `model.layers.N.mlp.gate.weight` in Qwen's files, and `layers.N.moe.router.weight` here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_samoe.convert.hf.families.base import (
    Family,
    Option,
    all_layers_are_moe,
    always,
    constant,
    one_number_of_experts,
    plain_heads,
    same,
)
from megatron_samoe.convert.hf.families.entries import entries_of
from megatron_samoe.convert.hf.families.llama import (
    FACTORS,
    FIXED,
    OPTIONS,
    WINDOW,
    gated,
    tensors,
)
from megatron_samoe.convert.hf.families.reading import MULTIPLIERS, layer_pattern, read_biases, window_by_layer
from megatron_samoe.convert.hf.parts import Constant, Row, at, below, stack, whole
from megatron_samoe.convert.native import NativeModel

_BLOCK = "model.layers.{layer}.mlp", "layers.{layer}.moe"
_MIXTRAL_BLOCK = "model.layers.{layer}.block_sparse_moe", "layers.{layer}.moe"
EXPERTS = below(
    *_BLOCK,
    ("gate.weight", "router.weight"),
    ("experts.{expert}.gate_proj.weight", "experts.w1", at(0)),
    ("experts.{expert}.up_proj.weight", "experts.w1", at(1)),
    ("experts.{expert}.down_proj.weight", "experts.w2"),
)
_MIXTRAL_EXPERTS = below(
    *_MIXTRAL_BLOCK,
    ("gate.weight", "router.weight"),
    ("experts.{expert}.w1.weight", "experts.w1", at(0)),
    ("experts.{expert}.w3.weight", "experts.w1", at(1)),
    ("experts.{expert}.w2.weight", "experts.w2"),
)
_GRANITE_EXPERTS = below(
    *_MIXTRAL_BLOCK,
    ("router.layer.weight", "router.weight"),
    ("input_linear.weight", "experts.w1", whole, stack),
    ("output_linear.weight", "experts.w2", whole, stack),
)

MOE = {"expert_layout": "moe", **FIXED}
_FIXED = {
    **MOE,
    "disable_bias_linear": True,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_router_topk_scaling_factor": None,
    "moe_residual_mlp": False,
}
_NO_SHARED_EXPERT = {"moe_shared_expert_intermediate_size": None}
_PLAIN = {**_FIXED, **_NO_SHARED_EXPERT, "sliding_window": None, "add_qkv_bias": False}


def weighs_among_chosen(native: NativeModel) -> str | None:
    """Experts weigh by their score among the chosen."""
    if not native.moe.pre_softmax:
        return None
    return "--moe-router-pre-softmax, which top-1 implies (it weighs by scores among the chosen experts)"


def weighs_among_all(native: NativeModel) -> str | None:
    """Experts weigh by their score among all."""
    return None if native.moe.pre_softmax else "no --moe-router-pre-softmax (it weighs by scores among all experts)"


def written_balance(native: NativeModel) -> dict[str, Any]:
    """Returns the entry of the balance loss's weight."""
    # transformers sums over the chosen experts, and averages over layers before the product: from the same coefficient its
    # loss is top-k / layers of ours. The number stays as it is, so that it reads as the one that a model was trained with.
    balanced = native.moe.moe_router_load_balancing_type != "none"
    return {"router_aux_loss_coef": native.moe.moe_aux_loss_coeff if balanced else 0.0}


#: Routing, as all of them have it.
ROUTING = (
    same("num_experts_per_tok", "moe_router_topk"),
    constant(output_router_logits=False),
    Option(written_balance, lambda config: {"moe_aux_loss_coeff": float(config["router_aux_loss_coef"])}),
)
#: Weights among the chosen experts or among all.
WEIGHTS = Option(
    lambda native: {"norm_topk_prob": not native.moe.pre_softmax},
    lambda config: {"moe_router_pre_softmax": not config["norm_topk_prob"]},
)
#: A factor on the weights.
SCALE = Option(
    lambda native: {"routed_scaling_factor": native.moe.weight_factor},
    lambda config: (
        {}
        if config["routed_scaling_factor"] == 1
        else {"moe_router_topk_scaling_factor": float(config["routed_scaling_factor"])}
    ),
)
_AMONG_CHOSEN = always(moe_router_pre_softmax=False)
#: The width of an expert, where the class has no dense layers.
_WIDTH = same("intermediate_size", "moe_ffn_hidden_size", written="expert_size")
EXPERT_WIDTH = same("moe_intermediate_size", "moe_ffn_hidden_size", written="expert_size")

MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    "experts in every layer, weighed among the chosen ones",
    tensors=tensors(*_MIXTRAL_EXPERTS),
    entries=entries_of("mixtral"),
    options=(
        *OPTIONS,
        *ROUTING,
        _AMONG_CHOSEN,
        _WIDTH,
        same("num_local_experts", "num_experts"),
        same("router_jitter_noise", "moe_input_jitter_eps", float),
        WINDOW,
    ),
    fixed={**_FIXED, **_NO_SHARED_EXPERT, "qk_layernorm": False, "add_qkv_bias": False, "window_attn_skip_freq": None},
    rules=(one_number_of_experts, all_layers_are_moe, weighs_among_chosen),
)


def _written_pattern(native: NativeModel) -> dict[str, Any]:
    dense = [i for i, is_moe in enumerate(native.is_moe) if not is_moe]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense, "use_sliding_window": False}


def _read_pattern(config: Mapping[str, Any]) -> dict[str, Any]:
    window_by_layer({"layer_types": None, **config})  # refuses what it does not know
    return {"moe_layer_freq": layer_pattern(config)}


_QWEN = (*OPTIONS, *ROUTING, WEIGHTS, same("num_experts"), EXPERT_WIDTH, Option(_written_pattern, _read_pattern))
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    "experts in any layers, norms of each head's queries and keys",
    tensors=tensors(*EXPERTS),
    entries=entries_of("qwen3_moe"),
    options=(*_QWEN, constant(attention_bias=False)),
    fixed={**_PLAIN, "qk_layernorm": True, "qk_layernorm_scope": "head"},
    rules=(one_number_of_experts,),
)


def _no_shared_expert(native: NativeModel, layer: int) -> Iterator[Constant]:
    """Their shared expert always is there, with a gate, sigmoid(w x): without one of ours it is one channel wide and zero.
    Where ours has no gate, w = 0 makes theirs always 1/2, which twice the output projection undoes without rounding."""
    theirs, hidden, moe = f"model.layers.{layer}.mlp.shared_expert", native.model.hidden_size, native.moe
    if not native.is_moe[layer]:
        return
    if moe.moe_shared_expert_intermediate_size is None:
        for name, shape in (("gate_proj", (1, hidden)), ("up_proj", (1, hidden)), ("down_proj", (hidden, 1))):
            yield Constant(f"{theirs}.{name}.weight", shape, 0.0, "our model has no shared expert")
    if not moe.moe_shared_expert_gate:
        why = "our shared expert has no gate (without megatron_samoe.json it would)"
        yield Constant(f"{theirs}_gate.weight", (1, hidden), 0.0, why)


def _qwen2_tensors(native: NativeModel) -> tuple[Any, ...]:
    theirs, ours = (f"{block}.shared_expert" for block in _BLOCK)
    gate = Row(f"{theirs}_gate.weight", f"{_BLOCK[1]}.mixing.weight")
    scale = 1.0 if native.moe.moe_shared_expert_gate else 2.0
    return tensors(*EXPERTS, *gated(theirs, ours, (whole, None, scale)), gate, _no_shared_expert)


def _written_shared_expert(native: NativeModel) -> dict[str, Any]:
    width = native.moe.moe_shared_expert_intermediate_size
    return {"shared_expert_intermediate_size": 1 if width is None else width}


def _read_shared_expert(config: Mapping[str, Any]) -> dict[str, Any]:
    width = config["shared_expert_intermediate_size"]
    return {"moe_shared_expert_intermediate_size": width, "moe_shared_expert_gate": True}


QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    "experts in any layers, weighed either way, besides a shared expert",
    tensors=_qwen2_tensors,
    entries=entries_of("qwen2_moe"),
    options=(
        *_QWEN,
        same("qkv_bias", "add_qkv_bias", written="qkv_bias"),
        Option(_written_shared_expert, _read_shared_expert),
    ),
    fixed={**_FIXED, "sliding_window": None, "qk_layernorm": False},
    rules=(one_number_of_experts,),
)


def _norms_all_heads(native: NativeModel) -> str | None:
    if native.model.num_attention_heads == 1 or native.model.qk_layernorm_scope == "all":
        return None
    return "--qk-layernorm-scope head (it norms all heads' queries together: --qk-layernorm-scope all)"


OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    "experts in every layer, one norm over all heads' queries and one over all keys",
    tensors=tensors(*EXPERTS),
    entries=entries_of("olmoe"),
    options=(
        *OPTIONS,
        *ROUTING,
        WEIGHTS,
        _WIDTH,
        same("num_experts"),
        constant(attention_bias=False),
        same("clip_qkv", kind=float),
        always(qk_layernorm_scope="all"),
    ),
    fixed={**_PLAIN, "qk_layernorm": True},
    rules=(one_number_of_experts, all_layers_are_moe, plain_heads, _norms_all_heads),
    knows=("clip_qkv",),
)
GRANITE_MOE = Family(
    "granitemoe",
    "GraniteMoeForCausalLM",
    "as mixtral, with factors on embeddings, scores, residuals and logits",
    tensors=tensors(*_GRANITE_EXPERTS),
    entries=entries_of("granitemoe"),
    options=(
        *OPTIONS,
        *ROUTING,
        _AMONG_CHOSEN,
        _WIDTH,
        same("num_local_experts", "num_experts"),
        Option(lambda native: {"attention_bias": native.model.attention_output_bias}, read_biases),
        FACTORS,
    ),
    fixed={**_PLAIN, "qk_layernorm": False},
    rules=(one_number_of_experts, all_layers_are_moe, weighs_among_chosen),
    knows=("attention_bias", *MULTIPLIERS),
)
