"""Descendants of LLaMA whose layers have experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_samoe.convert.hf.families import classes
from megatron_samoe.convert.hf.families.base import (
    Family,
    all_layers_are_moe,
    needs,
    one_number_of_experts,
    plain_heads,
)
from megatron_samoe.convert.hf.families.dense import COMPUTED
from megatron_samoe.convert.hf.families.llama import (
    SHARED_RULES,
    ExpertNames,
    StackNames,
    gated_mlp,
    read_shared_config,
    shared_parts,
    write_shared_config,
)
from megatron_samoe.convert.hf.families.reading import (
    layer_pattern,
    multipliers,
    read_biases,
    window,
    window_by_layer,
    written_multipliers,
)
from megatron_samoe.convert.hf.parts import Constant, Part, Parts, whole
from megatron_samoe.convert.native import NativeModel

_RULES = (
    needs("expert_layout", "moe"),
    *SHARED_RULES,
    needs("disable_bias_linear", True),
    needs("moe_router_score_function", "softmax"),
    needs("moe_router_enable_expert_bias", False),
    needs("moe_router_num_groups", None),
    needs("moe_router_topk_scaling_factor", None),
    needs("moe_residual_mlp", False),
    one_number_of_experts,
)
_NO_WINDOW = needs("sliding_window", None)
_NO_SHARED_EXPERT = needs("moe_shared_expert_intermediate_size", None)


def weighs_among_chosen(native: NativeModel) -> str | None:
    """Experts weigh by their score among the chosen."""
    if not native.moe.pre_softmax:
        return None
    return "--moe-router-pre-softmax, which top-1 implies (it weighs by scores among the chosen experts)"


def read_moe(
    config: Mapping[str, Any], model: dict[str, Any], num_experts: str, expert_size: str, pre_softmax: bool
) -> dict[str, dict[str, Any]]:
    """Returns native options; num_experts and expert_size are the entries that hold them."""
    moe = {
        "expert_layout": "moe",
        "num_experts": config[num_experts],
        "moe_ffn_hidden_size": config[expert_size],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_router_pre_softmax": pre_softmax,
        "moe_aux_loss_coeff": float(config["router_aux_loss_coef"]),
    }
    return {"model": model, "moe": moe}


def written_routing(native: NativeModel) -> dict[str, Any]:
    """Returns the entries of routing that all classes with experts share."""
    moe = native.moe
    balanced = moe.moe_router_load_balancing_type != "none"
    return {
        "num_experts_per_tok": moe.moe_router_topk,
        "output_router_logits": False,
        "router_aux_loss_coef": moe.moe_aux_loss_coeff if balanced else 0.0,
    }


def _write_mixtral(native: NativeModel) -> dict[str, Any]:
    return {
        **write_shared_config(native), **written_routing(native), "intermediate_size": native.expert_size,
        "num_local_experts": native.moe.num_experts, "router_jitter_noise": native.moe.moe_input_jitter_eps,
        "sliding_window": native.model.sliding_window,
    }  # fmt: skip


def _read_mixtral(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    model = {**read_shared_config(config), **window(config)}
    read = read_moe(config, model, "num_local_experts", "intermediate_size", pre_softmax=False)
    read["moe"]["moe_input_jitter_eps"] = float(config["router_jitter_noise"])
    return read


MIXTRAL = Family(
    "mixtral", "MixtralForCausalLM", "experts in every layer, weighed among the chosen ones",
    (*_RULES, all_layers_are_moe, weighs_among_chosen, _NO_SHARED_EXPERT, needs("qk_layernorm", False),
     needs("add_qkv_bias", False), needs("window_attn_skip_freq", None)),
    _write_mixtral,
    lambda native: shared_parts(native, ExpertNames("block_sparse_moe", "w1", "w3", "w2")),
    classes.MIXTRAL, _read_mixtral, COMPUTED,
)  # fmt: skip


def _write_qwen_moe(native: NativeModel) -> dict[str, Any]:
    dense = [i for i, is_moe in enumerate(native.is_moe) if not is_moe]
    return {
        **write_shared_config(native), **written_routing(native), "num_experts": native.moe.num_experts,
        "moe_intermediate_size": native.expert_size, "norm_topk_prob": not native.moe.pre_softmax,
        "decoder_sparse_step": 1, "mlp_only_layers": dense, "use_sliding_window": False,
    }  # fmt: skip


def _read_qwen_moe(config: Mapping[str, Any], model: dict[str, Any], **moe: Any) -> dict[str, dict[str, Any]]:
    window_by_layer({"layer_types": None, **config})
    read = read_moe(config, model, "num_experts", "moe_intermediate_size", not config["norm_topk_prob"])
    moe["moe_layer_freq"] = layer_pattern(config)
    return {**read, "moe": {**read["moe"], **moe}}


def _read_qwen3_moe(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return _read_qwen_moe(config, {**read_shared_config(config), "qk_layernorm": True})


QWEN3_MOE = Family(
    "qwen3_moe", "Qwen3MoeForCausalLM", "experts in any layers, norms of each head's queries and keys",
    (*_RULES, _NO_WINDOW, _NO_SHARED_EXPERT, needs("qk_layernorm", True), needs("qk_layernorm_scope", "head"),
     needs("add_qkv_bias", False)),
    lambda native: {**_write_qwen_moe(native), "attention_bias": False},
    lambda native: shared_parts(native, ExpertNames()),
    classes.QWEN3_MOE, _read_qwen3_moe, COMPUTED,
)  # fmt: skip

_SHARED = "shared_expert"


def _qwen2_shared_expert(native: NativeModel, theirs: str, ours: str) -> Iterator[Part | Constant]:
    """Their shared expert always has a gate, sigmoid(w x). Where ours has none, w = 0 makes the gate always 1/2, which twice
    the output projection undoes without rounding. Where we have no shared expert theirs is one channel wide and zero."""
    hidden, width = native.model.hidden_size, native.moe.moe_shared_expert_intermediate_size
    is_gated = native.moe.moe_shared_expert_gate
    if width is not None:
        scale = 1.0 if is_gated else 2.0
        yield from gated_mlp(f"{theirs}.{_SHARED}", f"{ours}.{_SHARED}", hidden, width, bias=False, down_scale=scale)
    else:
        for name, shape in (("gate_proj", (1, hidden)), ("up_proj", (1, hidden)), ("down_proj", (hidden, 1))):
            yield Constant(f"{theirs}.{_SHARED}.{name}.weight", shape, 0.0, "our model has no shared expert")
    gate = f"{theirs}.{_SHARED}_gate.weight"
    if is_gated:
        yield Part(gate, f"{ours}.mixing.weight", whole, (1, hidden))
    else:
        yield Constant(gate, (1, hidden), 0.0, "our shared expert has no gate (without megatron_samoe.json it would)")


def _qwen2_moe_parts(native: NativeModel) -> Parts:
    return shared_parts(native, ExpertNames(), _qwen2_shared_expert)


def _write_qwen2_moe(native: NativeModel) -> dict[str, Any]:
    width = native.moe.moe_shared_expert_intermediate_size
    return {
        **_write_qwen_moe(native), "qkv_bias": native.model.qkv_bias,
        "shared_expert_intermediate_size": 1 if width is None else width,
    }  # fmt: skip


def _read_qwen2_moe(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    model = {**read_shared_config(config), "add_qkv_bias": config["qkv_bias"]}
    width = config["shared_expert_intermediate_size"]
    return _read_qwen_moe(config, model, moe_shared_expert_intermediate_size=width, moe_shared_expert_gate=True)


QWEN2_MOE = Family(
    "qwen2_moe", "Qwen2MoeForCausalLM", "experts in any layers, weighed either way, besides a shared expert",
    (*_RULES, _NO_WINDOW, needs("qk_layernorm", False)),
    _write_qwen2_moe, _qwen2_moe_parts, classes.QWEN2_MOE, _read_qwen2_moe, COMPUTED,
)  # fmt: skip


def _norms_all_heads(native: NativeModel) -> str | None:
    if native.model.num_attention_heads == 1 or native.model.qk_layernorm_scope == "all":
        return None
    return "--qk-layernorm-scope head (it norms all heads' queries together: --qk-layernorm-scope all)"


def _read_olmoe(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    clip = None if config["clip_qkv"] is None else float(config["clip_qkv"])
    norms = {"qk_layernorm": True, "qk_layernorm_scope": "all"}
    model = {**read_shared_config(config), **norms, "clip_qkv": clip}
    return read_moe(config, model, "num_experts", "intermediate_size", not config["norm_topk_prob"])


OLMOE = Family(
    "olmoe", "OlmoeForCausalLM", "experts in every layer, one norm over all heads' queries and one over all keys",
    (*_RULES, all_layers_are_moe, _NO_WINDOW, _NO_SHARED_EXPERT, needs("qk_layernorm", True), needs("add_qkv_bias", False),
     plain_heads, _norms_all_heads),
    lambda native: {
        **write_shared_config(native), **written_routing(native), "intermediate_size": native.expert_size,
        "num_experts": native.moe.num_experts, "norm_topk_prob": not native.moe.pre_softmax, "attention_bias": False,
        "clip_qkv": native.model.clip_qkv,
    },
    lambda native: shared_parts(native, ExpertNames()),
    classes.OLMOE, _read_olmoe, COMPUTED, ("clip_qkv",),
)  # fmt: skip


def _write_granite_moe(native: NativeModel) -> dict[str, Any]:
    return {
        **write_shared_config(native), **written_routing(native), "intermediate_size": native.expert_size,
        "num_local_experts": native.moe.num_experts, "attention_bias": native.model.attention_output_bias,
        **written_multipliers(native.model),
    }  # fmt: skip


def _read_granite_moe(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    model = {**read_shared_config(config), **read_biases(config), **multipliers(config)}
    return read_moe(config, model, "num_local_experts", "intermediate_size", pre_softmax=False)


GRANITE_MOE = Family(
    "granitemoe", "GraniteMoeForCausalLM", "as mixtral, with factors on embeddings, scores, residuals and logits",
    (*_RULES, all_layers_are_moe, weighs_among_chosen, _NO_WINDOW, _NO_SHARED_EXPERT, needs("qk_layernorm", False),
     needs("add_qkv_bias", False)),
    _write_granite_moe,
    lambda native: shared_parts(native, StackNames("block_sparse_moe", "router.layer", "input_linear", "output_linear")),
    classes.GRANITE_MOE, _read_granite_moe, COMPUTED, ("attention_bias", *classes.MULTIPLIERS),
)  # fmt: skip
