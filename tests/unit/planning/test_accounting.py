"""Counts of parameters against built models. FLOPs are those of published pages (test_published_rows.py)."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_samoe.models.layer_layout import all_layers
from megatron_samoe.models.rank_model import RankModel
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.planning.accounting import count_parameters, forward_flops_per_token
from tests.harness.tiny import tiny_config


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    layout = draw(st.sampled_from(["dense", "moe", "samoe"]))
    options: dict[str, Any] = {
        "layout": layout,
        "style": draw(st.sampled_from(["gpt3", "llama"])),
        "num_layers": draw(st.integers(1, 5)),
        "ffn_hidden_size": draw(st.none() | st.integers(1, 50)),
        "hidden_size": draw(st.sampled_from([16, 32, 48])),
        "kv_channels": draw(st.none() | st.sampled_from([2, 10])),
        "normalization": draw(st.sampled_from(["LayerNorm", "RMSNorm"])),
        "swiglu": draw(st.booleans()),
        "disable_bias_linear": draw(st.booleans()),
        "qk_layernorm": draw(st.booleans()),
        "untie_embeddings_and_output_weights": draw(st.booleans()),
        "position_embedding_type": draw(st.sampled_from(["learned_absolute", "rope", "none"])),
        "max_position_embeddings": draw(st.none() | st.integers(16, 40)),
        "make_vocab_size_divisible_by": draw(st.sampled_from([1, 8, 128])),
    }
    if options["disable_bias_linear"]:
        options["add_qkv_bias"] = draw(st.booleans())
    if layout != "dense":
        num_experts = draw(st.integers(1, 5))
        topk = draw(st.integers(1, num_experts))
        options |= {
            "num_experts": num_experts,
            "moe_router_topk": topk,
            "moe_ffn_hidden_size": draw(st.integers(1, 20) if topk > 1 else st.none() | st.integers(1, 20)),
            "moe_shared_expert_intermediate_size": draw(st.none() | st.integers(1, 20)),
            "moe_layer_freq": draw(st.sampled_from(["1", "2"])) if options["num_layers"] > 1 else "1",
        }
    if layout == "samoe":
        options |= {
            "num_expert_banks": draw(st.integers(1, 4)),
            "samoe_granularity": draw(st.sampled_from(["layer", "expert"])),
            "samoe_freeze_coefficients": draw(st.booleans()),
        }
    return options


@settings(deadline=None, max_examples=80)
@given(configurations(), st.integers(1, 300))
def test_counts_equal_the_built_models(options: dict[str, Any], vocab_size: int) -> None:
    config = tiny_config(**options)
    parameters = RankModel(config, vocab_size, single_process_state("meta"), torch.float32).global_parameters()
    count = count_parameters(config, vocab_size)
    assert count.total == sum(p.numel() for p in parameters.values())
    experts = {n: p for n, p in parameters.items() if n.startswith("expert_pool.") or ".moe.experts." in n}
    assert count.expert == sum(p.numel() for p in experts.values())
    moe_layers = sum(place.moe_index is not None for place in all_layers(config))
    sets = config.moe.num_expert_banks if config.moe.has_pool else moe_layers
    one_expert = count.expert // (sets * config.moe.num_experts) if count.expert else 0
    assert count.active == count.total - count.expert + moe_layers * config.moe.moe_router_topk * one_expert


def test_a_window_saves_products() -> None:
    plain, narrow, mixed = (
        forward_flops_per_token(tiny_config("dense", seq_length=64, **o), 103)
        for o in ({}, {"sliding_window": 1}, {"sliding_window": 1, "window_attn_skip_freq": 2})
    )
    # In each of four layers two products of 32 channels with 32 keys, or with one.
    assert plain - narrow == 4 * 4 * 32 * 31 and mixed == (plain + narrow) / 2
