"""The class of an export follows from what the model computes."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_samoe.convert.hf.target import choose_target
from megatron_samoe.convert.native import NativeModel
from megatron_samoe.errors import ConfigError
from tests.harness.tiny import VOCAB_SIZE, tiny_config

LLAMA: dict[str, Any] = {"style": "llama"}
MOE: dict[str, Any] = {"style": "llama", "moe_router_topk": 2}


def model(layout: str, **options: Any) -> NativeModel:
    return NativeModel(tiny_config(layout, **options), VOCAB_SIZE)


@pytest.mark.parametrize(
    ("layout", "options", "family"),
    [
        ("dense", LLAMA, "llama"),
        ("dense", {**LLAMA, "disable_bias_linear": False}, "llama"),
        ("dense", {**LLAMA, "add_qkv_bias": True}, "qwen2"),
        ("dense", {**LLAMA, "qk_layernorm": True}, "qwen3"),
        ("dense", {**LLAMA, "sliding_window": 8}, "mistral"),
        ("dense", {**LLAMA, "qk_layernorm": True, "sliding_window": 8, "window_attn_skip_freq": 2}, "qwen3"),
        ("moe", {**MOE, "sliding_window": 8}, "mixtral"),
        ("moe", {**MOE, "qk_layernorm": True, "qk_layernorm_scope": "all"}, "olmoe"),
        ("dense", {}, "gpt2"),
        ("dense", {"position_embedding_type": "rope"}, "gpt_neox"),
        ("moe", MOE, "mixtral"),
        ("moe", {**MOE, "qk_layernorm": True}, "qwen3_moe"),
        # What Mixtral has no place for: weights among all experts, dense layers, a shared expert, biased queries.
        ("moe", LLAMA, "qwen2_moe"),
        ("moe", {**MOE, "moe_router_pre_softmax": True}, "qwen2_moe"),
        ("moe", {**MOE, "moe_layer_freq": "2"}, "qwen2_moe"),
        ("moe", {**MOE, "moe_shared_expert_intermediate_size": 8}, "qwen2_moe"),
        ("moe", {**MOE, "add_qkv_bias": True}, "qwen2_moe"),
        # What no stock class computes.
        ("dense", {"swiglu": True}, "samoe"),
        ("dense", {**LLAMA, "rotary_percent": 0.5}, "samoe"),
        ("dense", {**LLAMA, "position_embedding_type": "none"}, "samoe"),
        ("dense", {"qk_layernorm": True}, "samoe"),
        ("moe", {}, "samoe"),
        ("moe", {**MOE, "moe_router_score_function": "sigmoid"}, "samoe"),
        ("moe", {**MOE, "qk_layernorm": True, "moe_shared_expert_intermediate_size": 8}, "samoe"),
        ("moe", {**MOE, "disable_bias_linear": False}, "samoe"),
        ("dense", {**LLAMA, "sliding_window": 8, "window_attn_skip_freq": 2}, "samoe"),
        (
            "moe",
            {"position_embedding_type": "rope", "rope_scaling_type": "linear", "rope_scaling_factor": 2.0},
            "samoe",
        ),
    ],
)
def test_auto_takes_the_stock_class_that_computes_the_same(layout: str, options: dict[str, Any], family: str) -> None:
    target = choose_target(model(layout, **options))
    assert target.family.name == family and not target.fold
    if layout == "moe":
        folded = choose_target(model("samoe", **options), fold=True)
        assert folded.family.name == family and folded.fold


def test_a_pool_is_kept_unless_folding_is_asked_for() -> None:
    kept = choose_target(model("samoe", **MOE))
    assert kept.family.name == "samoe" and not kept.fold and "keeps what layers share" in kept.why[-1]
    assert choose_target(model("samoe", **MOE), "samoe", fold=True).fold
    implied = choose_target(model("samoe", **MOE), "mixtral")
    assert implied.family.name == "mixtral" and implied.fold and "folded" in implied.why[-1]


def test_reasons_name_what_each_class_lacks() -> None:
    why = choose_target(model("moe", **MOE, moe_layer_freq="2")).why
    assert why[0] == "not mixtral: --moe-layer-freq 2 (all of its layers are MoE)"
    assert why[-1] == "qwen2_moe computes the same function" and not any("llama" in line for line in why)


@pytest.mark.parametrize(
    ("layout", "options", "wanted", "fold", "message"),
    [
        ("dense", LLAMA, "gpt2", False, r"GPT2LMHeadModel does not compute --normalization RMSNorm .* These classes do: llama"),
        ("moe", MOE, "qwen3_moe", False, r"no --qk-layernorm \(it needs --qk-layernorm\)"),
        ("moe", {**MOE, "qk_layernorm": True}, "olmoe", False, "norms all heads' queries together"),
        ("dense", {**LLAMA, "kv_channels": 16, "num_attention_heads": 3, "group_query_attention": False,
                   "num_query_groups": 1}, "llama", False, "must divide --hidden-size 32"),
        ("dense", {"kv_channels": 16}, "gpt2", False, "--kv-channels 16"),
        ("dense", {**LLAMA, "softmax_type": "learnable"}, "auto", False, "--softmax-type = 'learnable': is not known to Hugging Face"),
        ("moe", {**MOE, "attn_logit_softcapping": 30.0}, "auto", False, "--attn-logit-softcapping"),
        ("dense", {"final_logit_softcapping": 30.0}, "auto", False, "--final-logit-softcapping"),
        ("moe", MOE, "auto", True, "needs a model whose layers share experts"),
        ("moe", MOE, "mixtrl", False, "Did you mean 'mixtral'"),
    ],
)  # fmt: skip
def test_impossible_targets_are_refused(
    layout: str, options: dict[str, Any], wanted: str, fold: bool, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_target(model(layout, **options), wanted, fold)
