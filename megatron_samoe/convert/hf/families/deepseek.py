"""DeepSeek's classes: latent attention, a shared expert without a gate, and dense layers before those with experts.

Their files keep the channels of rotary positions in pairs, ours the first halves of all pairs before the second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_samoe.config.model import ModelConfig
from megatron_samoe.convert.hf.families import classes
from megatron_samoe.convert.hf.families.base import Family, Rule, needs, one_number_of_experts
from megatron_samoe.convert.hf.families.dense import COMPUTED
from megatron_samoe.convert.hf.families.entries import CannotCompute
from megatron_samoe.convert.hf.families.experts import read_moe, written_routing
from megatron_samoe.convert.hf.families.llama import (
    SHARED_RULES,
    ExpertNames,
    gated_mlp,
    norm_part,
    read_shared_config,
    shared_parts,
    write_shared_config,
)
from megatron_samoe.convert.hf.families.reading import rope_of
from megatron_samoe.convert.hf.parts import Part, Parts, whole
from megatron_samoe.convert.native import NativeModel
from megatron_samoe.errors import ConfigError

#: Of latent norms, whatever config.json says of the others.
_EPSILON = 1e-6
#: Entries of latent attention: theirs and ours.
_LATENT = {
    "q_lora_rank": "q_lora_rank", "kv_lora_rank": "kv_lora_rank", "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim", "v_head_dim": "v_head_dim",
}  # fmt: skip


def _mscale(model: ModelConfig) -> float:
    """Returns the entry mscale_all_dim, which YaRN's factor on scores is made of; 0 where there is none."""
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


def _weighs_among_all(native: NativeModel) -> str | None:
    return None if native.moe.pre_softmax else "no --moe-router-pre-softmax (it weighs by scores among all experts)"


def _two_of_a_group(native: NativeModel) -> str | None:
    moe = native.moe
    if moe.moe_router_group_topk is None or moe.moe_router_topk == 2 * moe.moe_router_group_topk:
        return None
    return f"--moe-router-group-topk {moe.moe_router_group_topk} (it needs half of --moe-router-topk)"


_RULES: tuple[Rule, ...] = (
    needs("expert_layout", "moe"), *SHARED_RULES, needs("disable_bias_linear", True), needs("multi_latent_attention", True),
    needs("norm_epsilon", _EPSILON), needs("sliding_window", None), needs("moe_residual_mlp", False),
    needs("moe_shared_expert_gate", False), one_number_of_experts, _scores_have_an_entry, _dense_first, _whole_shared_experts,
)  # fmt: skip


def _write(native: NativeModel) -> dict[str, Any]:
    model, moe = native.model, native.moe
    written = {
        **write_shared_config(native), **written_routing(native), **{theirs: getattr(model, ours) for theirs, ours in _LATENT.items()},
        "head_dim": model.qk_pos_emb_head_dim, "attention_bias": False, "n_routed_experts": moe.num_experts,
        "moe_intermediate_size": native.expert_size,
        "n_shared_experts": (moe.moe_shared_expert_intermediate_size or 0) // native.expert_size,
        "first_k_dense_replace": native.is_moe.index(True), "norm_topk_prob": not moe.pre_softmax,
        "routed_scaling_factor": moe.moe_router_topk_scaling_factor or 1.0,
    }  # fmt: skip
    if mscale := _mscale(model):
        for key in ("rope_scaling", "rope_parameters"):
            written[key] = {**written[key], "mscale_all_dim": mscale}
    return written


def _read(config: Mapping[str, Any], pre_softmax: bool, **moe: Any) -> dict[str, dict[str, Any]]:
    rotated, heads = config["qk_rope_head_dim"], config["num_attention_heads"]
    width = config["qk_nope_head_dim"] + rotated
    for name, size in (("num_key_value_heads", heads), ("head_dim", rotated), ("qk_head_dim", width)):
        if config.get(name, size) != size:
            raise ConfigError(f"config.json: {name}", config[name], f"must be {size} for the class's other sizes")
    sizes = {ours: config[theirs] for theirs, ours in _LATENT.items()}
    rope = rope_of(config)
    multiplier = _multiplier(rope.get("mscale_all_dim"), rope.get("factor", 1.0), width)
    model = {**read_shared_config(config), **sizes, "kv_channels": None, "multi_latent_attention": True}
    if multiplier is not None:
        model["attention_multiplier"] = multiplier
    dense, layers = config["first_k_dense_replace"], model["num_layers"]
    if not 0 <= dense < layers:
        raise ConfigError("config.json: first_k_dense_replace", dense, f"must be below the {layers} layers")
    read = read_moe(config, model, "n_routed_experts", "moe_intermediate_size", pre_softmax)
    scale = float(config["routed_scaling_factor"])
    read["moe"] |= {
        "moe_shared_expert_intermediate_size": config["n_shared_experts"] * config["moe_intermediate_size"],
        "moe_layer_freq": "0" * dense + "1" * (layers - dense), **({} if scale == 1.0 else {"moe_router_topk_scaling_factor": scale}),
        **moe,
    }  # fmt: skip
    return read


def _write_v3(native: NativeModel) -> dict[str, Any]:
    moe = native.moe
    return {
        **_write(native), "n_group": moe.moe_router_num_groups or 1, "topk_group": moe.moe_router_group_topk or 1,
        "rope_interleave": True, "num_nextn_predict_layers": 0,
    }  # fmt: skip


def _read_v3(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    groups, chosen, experts = config["n_group"], config["topk_group"], config["n_routed_experts"]
    if not 1 <= chosen <= groups or experts % groups:
        raise ConfigError(
            "config.json: n_group",
            groups,
            f"must divide n_routed_experts ({experts}), and be topk_group ({chosen}) or more",
        )
    given = {} if groups == chosen else {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}
    if given and config["num_experts_per_tok"] != 2 * chosen:
        raise ConfigError(
            "config.json: topk_group", chosen, f"{CannotCompute}; it must be half of num_experts_per_tok or n_group"
        )
    return _read(config, not config["norm_topk_prob"], moe_router_score_function="sigmoid",
                 moe_router_enable_expert_bias=True, **given)  # fmt: skip


def _in_pairs(before: int, rotated: int) -> tuple[int, ...]:
    """Returns our place of each of their channels, of which the last `rotated` are pairs."""
    half = rotated // 2
    return (*range(before), *(before + j + part * half for j in range(half) for part in (0, 1)))


def latent_attention_parts(native: NativeModel, theirs: str, ours: str, in_pairs: bool = True) -> Iterator[Part]:
    """Yields the tensors of latent attention; `in_pairs` says whether the class keeps rotated channels in pairs."""
    model = native.model
    hidden, heads, rotated = model.hidden_size, model.num_attention_heads, model.qk_pos_emb_head_dim
    of_queries, of_latents = (
        _in_pairs(before, rotated) if in_pairs else () for before in (model.qk_head_dim, model.kv_lora_rank)
    )
    queries, inputs = "q_proj", hidden
    if model.q_lora_rank is not None:
        queries, inputs = "q_b_proj", model.q_lora_rank
        yield Part(f"{theirs}.q_a_proj.weight", f"{ours}.q_down.weight", whole, (inputs, hidden))
        yield norm_part(f"{theirs}.q_a_layernorm", f"{ours}.q_norm", inputs)
    shape = (heads * model.query_dim, inputs)
    yield Part(f"{theirs}.{queries}.weight", f"{ours}.q_up.weight", whole, shape, order=of_queries)
    shape = (model.latent_dim, hidden)
    yield Part(
        f"{theirs}.kv_a_proj_with_mqa.weight", f"{ours}.kv_down.weight", lambda t: t[None], shape, order=of_latents
    )
    yield norm_part(f"{theirs}.kv_a_layernorm", f"{ours}.kv_norm", model.kv_lora_rank)
    shape = (heads * (model.qk_head_dim + model.v_head_dim), model.kv_lora_rank)
    yield Part(f"{theirs}.kv_b_proj.weight", f"{ours}.kv_up.weight", whole, shape)
    yield Part(f"{theirs}.o_proj.weight", f"{ours}.output.weight", whole, (hidden, heads * model.v_head_dim))
    if model.attention_output_bias:
        yield Part(f"{theirs}.o_proj.bias", f"{ours}.output.bias", whole, (hidden,))


def _beside(native: NativeModel, theirs: str, ours: str) -> Iterator[Part]:
    """Yields what an MoE layer has besides experts and router."""
    if native.moe.moe_router_enable_expert_bias:
        shape = (native.moe.most_experts,)
        yield Part(f"{theirs}.gate.e_score_correction_bias", f"{ours}.router.expert_bias", whole, shape)
    hidden, width = native.model.hidden_size, native.moe.moe_shared_expert_intermediate_size
    assert width is not None
    yield from gated_mlp(f"{theirs}.shared_experts", f"{ours}.shared_expert", hidden, width, bias=False)


def _parts(native: NativeModel) -> Parts:
    return shared_parts(native, ExpertNames(), _beside, latent_attention_parts)


DEEPSEEK_V3 = Family(
    "deepseek_v3", "DeepseekV3ForCausalLM", "latent attention; experts by sigmoid scores, biases and groups, and a shared expert",
    (*_RULES, needs("moe_router_score_function", "sigmoid"), needs("moe_router_enable_expert_bias", True), _two_of_a_group),
    _write_v3, _parts, classes.DEEPSEEK_V3, _read_v3, COMPUTED, ("multi_latent_attention", "attention_multiplier"),
)  # fmt: skip
DEEPSEEK_V2 = Family(
    "deepseek_v2", "DeepseekV2ForCausalLM", "latent attention; experts by softmax scores among all, and a shared expert",
    (*_RULES, needs("moe_router_score_function", "softmax"), needs("moe_router_enable_expert_bias", False),
     needs("moe_router_num_groups", None), _weighs_among_all),
    lambda native: {**_write(native), "topk_method": "greedy"}, _parts, classes.DEEPSEEK_V2,
    lambda config: _read(config, pre_softmax=True), COMPUTED,
    ("multi_latent_attention", "attention_multiplier"),
)  # fmt: skip
