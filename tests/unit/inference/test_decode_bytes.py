"""The bytes of a step in closed form, against counts and against the weights that a runner holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_samoe.inference.decode_bytes import expected_distinct_experts, step_bytes
from megatron_samoe.inference.decode_layers import make_decode_model
from megatron_samoe.inference.kv_cache import PAGE
from megatron_samoe.inference.serving import Precision
from tests.harness.tables import table
from tests.harness.tiny import tiny_config
from tests.unit.inference.tiny_models import VOCAB, loaded_tiny

TABLE = table(__file__)


@pytest.mark.parametrize(("experts", "topk", "tokens"), [(32, 2, 1), (32, 2, 8), (32, 2, 32), (64, 1, 40), (6, 6, 3)])
def test_expected_experts_are_those_of_even_routing(experts: int, topk: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(1)
    trials = 3000
    hit = torch.zeros(trials, experts, dtype=torch.bool)
    for _ in range(tokens):
        chosen = torch.rand(trials, experts, generator=generator).topk(topk, 1).indices
        hit.scatter_(1, chosen, True)
    counts = hit.sum(1).float()
    error = 4 * float(counts.std()) / trials**0.5 + 1e-6
    assert float(counts.mean()) == pytest.approx(expected_distinct_experts(experts, topk, tokens), abs=error)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("layout", "options"), TABLE["models"], ids=str)
def test_a_step_that_hits_every_expert_reads_what_there_is(
    layout: str, options: dict[str, Any], dtype: Precision
) -> None:
    loaded = loaded_tiny(layout, style="llama", hidden_size=64, ffn_hidden_size=128, **options)
    model = make_decode_model(loaded.model, "folded", dtype, 0)
    # Bytes by place in memory: what layers share is there once.
    held = (
        sum({t.data_ptr(): t.nbytes for t in model.weights()}.values()) - model.words.num_bytes
    )  # of which a step reads a few rows only
    held -= sum(t.nbytes for t in (model.cos_PR, model.sin_PR) if t is not None)
    read = step_bytes(loaded.config, VOCAB, 1, 0, "folded", dtype, distinct=4)
    assert read.cache == 0
    # Norms and scales outside of experts are fp32 and not counted as such; padding is counted and not held.
    assert read.total == pytest.approx(held, rel=0.06)


def test_layers_that_follow_each_other_read_what_they_hit_of_one_set_together() -> None:
    def experts(sharing: str, distinct: float | None = None) -> float:
        config = tiny_config("moe", num_experts=8, moe_router_topk=2, expert_sharing=sharing)
        return step_bytes(config, VOCAB, 3, 0.0, "folded", "bf16", distinct).experts

    own, together = (expected_distinct_experts(8, 2, 3 * layers) for layers in (1, 3))
    one = experts("own") / (4 * own)  # bytes of an expert
    assert experts("0,1,0,1") == pytest.approx(4 * own * one)
    assert experts("scaled:own,0,0,0") == experts("own,0,0,0") == pytest.approx((own + together) * one)
    # Three layers that hit half of the experts each leave an eighth.
    assert experts("own,0,0,0", 4.0) == pytest.approx((4 + 7) * one)


def test_on_the_fly_reads_every_bank_and_the_cache_grows_with_the_context() -> None:
    config = loaded_tiny("samoe", num_expert_banks=3).config
    folded, pooled = (step_bytes(config, VOCAB, 2, 10.0, way, "fp32") for way in ("folded", "on-the-fly"))
    assert pooled.experts == 3 * folded.experts and pooled.others == folded.others
    model = make_decode_model(loaded_tiny("samoe").model, "folded", "fp32", 1)
    page = sum(layer.attention.keys.nbytes + layer.attention.values.nbytes for layer in model.layers)
    assert step_bytes(config, VOCAB, 2, PAGE / 2, "folded", "fp32").cache == page


def test_only_the_window_is_read() -> None:
    long = {"seq_length": 512, "max_position_embeddings": 512}
    read = {
        window: step_bytes(tiny_config("dense", sliding_window=window, **long), VOCAB, 4, 400.0, "folded", "fp32").cache
        for window in (None, 100)
    }
    assert read[100] == read[None] / 4
