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
from tests.harness.tables import table
from tests.harness.tiny import tiny_config

TABLE = table(__file__)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    layout = draw(st.sampled_from(["dense", "moe", "samoe"]))
    kinds = {"dense": ["all"], "moe": ["all", "experts"], "samoe": ["all", "experts", "banks"]}[layout]
    options = {name: draw(st.sampled_from(values)) for kind in kinds for name, values in TABLE[kind].items()}
    if not options["disable_bias_linear"]:
        del options["add_qkv_bias"]
    if layout != "dense":
        options["moe_router_topk"] = topk = draw(st.integers(1, options["num_experts"]))
        if topk > 1 and options["moe_ffn_hidden_size"] is None:
            options["moe_ffn_hidden_size"] = 20
        if options["num_layers"] == 1:
            options["moe_layer_freq"] = "1"
    return {"layout": layout, **options}


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
