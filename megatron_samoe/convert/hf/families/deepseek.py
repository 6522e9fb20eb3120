"""DeepSeek's classes: latent attention, a shared expert without a gate, and dense layers before those with experts.

Their files keep the channels of rotary positions in pairs, ours the first halves of all pairs before the second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_samoe.config.model import ModelConfig
from megatron_samoe.convert.hf.families.base import Family, Option, Rule, constant, one_number_of_experts, same
from megatron_samoe.convert.hf.families.entries import CannotCompute, entries_of, wrong_entry
from megatron_samoe.convert.hf.families.experts import (
    EXPERT_WIDTH,
    EXPERTS,
    MOE,
    ROUTING,
    SCALE,
    WEIGHTS,
    weighs_among_all,
)
from megatron_samoe.convert.hf.families.llama import OPTIONS, ROPE, gated, tensors
from megatron_samoe.convert.hf.families.reading import rope_of
from megatron_samoe.convert.hf.parts import Row, in_pairs, modules, whole
from megatron_samoe.convert.native import NativeModel


def latent_attention(native: NativeModel, has_pairs: bool = True) -> tuple[Row, ...]:
    """Returns the lines of latent attention; `has_pairs` says whether the class keeps rotated channels in pairs."""
    model = native.model
    of_queries, of_latents = (
        in_pairs(before, model.qk_pos_emb_head_dim) if has_pairs else ()
        for before in (model.qk_head_dim, model.kv_lora_rank)
    )
    queries = "q_proj" if model.q_lora_rank is None else "q_b_proj"
    return modules(
        "model.layers.{layer}.self_attn",
        "layers.{layer}.attention",
        ("q_a_proj", "q_down"),
        ("q_a_layernorm", "q_norm"),
        (queries, "q_up", whole, None, 1.0, of_queries),
        ("kv_a_proj_with_mqa", "kv_down", lambda t: t[None], None, 1.0, of_latents),
        ("kv_a_layernorm", "kv_norm"),
        ("kv_b_proj", "kv_up"),
        ("o_proj", "output"),
    )


def _tensors(native: NativeModel) -> tuple[Any, ...]:
    theirs, ours = "model.layers.{layer}.mlp", "layers.{layer}.moe"
    return tensors(
        *EXPERTS,
        Row(f"{theirs}.gate.e_score_correction_bias", f"{ours}.router.expert_bias"),
        *gated(f"{theirs}.shared_experts", f"{ours}.shared_expert"),
        attention=latent_attention(native),
    )


#: Entries of latent attention: theirs and ours.
_LATENT = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
}


def _mscale(model: ModelConfig) -> float:
    """Returns the entry mscale_all_dim, from which YaRN's factor on scores follows; 0 without one."""
    if model.attention_multiplier is None or model.rope_scaling_type != "yarn" or model.rope_scaling_factor <= 1:
        return 0.0
    root = math.sqrt(model.attention_multiplier * model.query_dim**0.5)
    return round((root - 1) / (0.1 * math.log(model.rope_scaling_factor)), 6)


def _multiplier(mscale: float | None, factor: float, width: int) -> float | None:
    """Returns the factor on scores of queries of a width; None for the usual one."""
    return (0.1 * mscale * math.log(factor) + 1) ** 2 * width**-0.5 if mscale and factor > 1 else None


def _scores_have_an_entry(native: NativeModel) -> str | None:
    model = native.model
    expected = _multiplier(_mscale(model), model.rope_scaling_factor, model.query_dim)
    if model.attention_multiplier is None or math.isclose(expected or 0.0, model.attention_multiplier, rel_tol=1e-12):
        return None
    return f"--attention-multiplier {model.attention_multiplier} (it has no factor but YaRN's)"


def _dense_first(native: NativeModel) -> str | None:
    if list(native.is_moe) == sorted(native.is_moe):
        return None
    return f"--moe-layer-freq {native.moe.moe_layer_freq} (all of its layers are MoE from some layer on)"


def _whole_shared_experts(native: NativeModel) -> str | None:
    width, size = native.moe.moe_shared_expert_intermediate_size, native.expert_size
    if width is not None and width % size == 0:
        return None
    return f"--moe-shared-expert-intermediate-size {width} (it needs a multiple of --moe-ffn-hidden-size {size})"


def _two_of_a_group(native: NativeModel) -> str | None:
    moe = native.moe
    if moe.moe_router_group_topk is None or moe.choices_of_group == 2:
        return None
    return f"--moe-router-group-topk {moe.moe_router_group_topk} (it needs half of --moe-router-topk)"


def _written_scores(native: NativeModel) -> dict[str, Any]:
    mscale = _mscale(native.model)
    rope = ROPE.write(native)
    return (
        {key: {**rope[key], "mscale_all_dim": mscale} for key in ("rope_scaling", "rope_parameters")} if mscale else {}
    )


def _read_scores(config: Mapping[str, Any]) -> dict[str, Any]:
    rotated, heads = config["qk_rope_head_dim"], config["num_attention_heads"]
    width = config["qk_nope_head_dim"] + rotated
    for name, size in (("num_key_value_heads", heads), ("head_dim", rotated), ("qk_head_dim", width)):
        if config.get(name, size) != size:
            raise wrong_entry(name, config[name], f"must be {size} for the class's other sizes")
    rope = rope_of(config)
    multiplier = _multiplier(rope.get("mscale_all_dim"), rope.get("factor", 1.0), width)
    return {"kv_channels": None, **({} if multiplier is None else {"attention_multiplier": multiplier})}


def _written_layers(native: NativeModel) -> dict[str, Any]:
    shared = (native.moe.moe_shared_expert_intermediate_size or 0) // native.expert_size
    return {"n_shared_experts": shared, "first_k_dense_replace": native.is_moe.index(True)}


def _read_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    dense, layers = config["first_k_dense_replace"], config["num_hidden_layers"]
    if not 0 <= dense < layers:
        raise wrong_entry("first_k_dense_replace", dense, f"must be below the {layers} layers")
    return {
        "moe_shared_expert_intermediate_size": config["n_shared_experts"] * config["moe_intermediate_size"],
        "moe_layer_freq": "0" * dense + "1" * (layers - dense),
    }


_OPTIONS = (
    *OPTIONS,
    *ROUTING,
    *(same(theirs, ours) for theirs, ours in _LATENT.items()),
    Option(_written_scores, _read_scores),
    Option(lambda native: {"head_dim": native.model.qk_pos_emb_head_dim}, lambda config: {}),
    constant(attention_bias=False),
    same("n_routed_experts", "num_experts"),
    EXPERT_WIDTH,
    Option(_written_layers, _read_layers),
    WEIGHTS,
    SCALE,
)
_FIXED = {
    **MOE,
    "disable_bias_linear": True,
    "multi_latent_attention": True,
    "norm_epsilon": 1e-6,  # of latent norms, whatever config.json says of the others
    "sliding_window": None,
    "moe_residual_mlp": False,
    "moe_shared_expert_gate": False,
}
_RULES: tuple[Rule, ...] = (one_number_of_experts, _scores_have_an_entry, _dense_first, _whole_shared_experts)
_KNOWS = ("multi_latent_attention", "attention_multiplier")


def _written_groups(native: NativeModel) -> dict[str, Any]:
    return {"n_group": native.moe.moe_router_num_groups or 1, "topk_group": native.moe.moe_router_group_topk or 1}


def _read_groups(config: Mapping[str, Any]) -> dict[str, Any]:
    groups, chosen, experts = config["n_group"], config["topk_group"], config["n_routed_experts"]
    if not 1 <= chosen <= groups or experts % groups:
        raise wrong_entry(
            "n_group", groups, f"must divide n_routed_experts ({experts}), and be topk_group ({chosen}) or more"
        )
    if groups == chosen:
        return {}
    if config["num_experts_per_tok"] != 2 * chosen:
        raise wrong_entry("topk_group", chosen, f"{CannotCompute}; it must be half of num_experts_per_tok or n_group")
    return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    "latent attention; experts by sigmoid scores, biases and groups, and a shared expert",
    tensors=_tensors,
    entries=entries_of("deepseek_v3"),
    options=(
        Option(_written_groups, _read_groups),
        *_OPTIONS,
        constant(rope_interleave=True, num_nextn_predict_layers=0),
    ),
    fixed={**_FIXED, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    rules=(*_RULES, _two_of_a_group),
    knows=_KNOWS,
)
DEEPSEEK_V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    "latent attention; experts by softmax scores among all, and a shared expert",
    tensors=_tensors,
    entries=entries_of("deepseek_v2"),
    options=(*_OPTIONS, constant(topk_method="greedy")),
    fixed={
        **_FIXED,
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "moe_router_num_groups": None,
    },
    rules=(*_RULES, weighs_among_all),
    knows=_KNOWS,
)
