"""Options of attention and of layers, each in every layout as in one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.config import PretrainConfig
from tests.harness.layout_training import assert_same, train
from tests.harness.ranks import run_ranks
from tests.harness.tiny import tiny_config, with_layout

pytestmark = pytest.mark.distributed

LLAMA: dict[str, Any] = {"style": "llama", "init_method_std": 0.2}
LATENT: dict[str, Any] = {
    "multi_latent_attention": True, "group_query_attention": False, "num_query_groups": 1, "kv_lora_rank": 10, "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4, "v_head_dim": 5,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "window": {"layout": "dense", **LLAMA, "sliding_window": 5, "window_attn_skip_freq": 2},
    "sinks and cap": {"layout": "moe", **LLAMA, "moe_router_topk": 2, "softmax_type": "learnable", "attn_logit_softcapping": 0.5},
    "olmoe": {"layout": "moe", **LLAMA, "moe_router_topk": 2, "qk_layernorm": True, "qk_layernorm_scope": "all", "clip_qkv": 0.5},
    "granite": {
        "layout": "moe", **LLAMA, "moe_router_topk": 2, "attention_multiplier": 0.1, "embedding_multiplier": 6.0,
        "residual_multiplier": 0.3, "logits_scaling": 2.5, "attention_bias": True, "softmax_type": "off-by-one",
    },
    "neox": {
        "layout": "moe", "init_method_std": 0.2, "position_embedding_type": "rope", "rotary_percent": 0.5, "moe_layer_freq": "0101",
        "use_parallel_residual": True, "exact_gelu": True, "attention_bias": False, "hidden_dropout": 0.1,
    },
    "all": {
        "layout": "samoe", **LLAMA, "sliding_window": 6, "softmax_type": "learnable", "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.5, "qk_layernorm": True, "qk_layernorm_scope": "all", "rope_scaling_type": "yarn",
        "rope_scaling_factor": 4.0, "rope_original_max_positions": 8, "recompute_granularity": "selective",
    },
    "latent": {
        "layout": "moe", "style": "llama", "init_method_std": 0.2, **LATENT, "q_lora_rank": 12, "sliding_window": 7,
        "softmax_type": "learnable", "optimizer": "muon",
    },
    "latent plain": {"layout": "samoe", "style": "llama", "init_method_std": 0.2, **LATENT},
    "off by one": {"layout": "dense", "softmax_type": "off-by-one", "sliding_window": 3, "optimizer": "muon"},
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "zero dp2": (2, {"zero": True}),
    "tp2 sp": (2, {"tp": 2, "sp": True}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "cp2 a2a": (2, {"cp": 2, "comm": "a2a"}),
    "cp2": (2, {"cp": 2}),
}
#: Models whose scores are nothing but products, as keys and values that go round need.
PLAIN = ("olmoe", "neox", "latent plain")


def models_of(layout: str) -> tuple[str, ...]:
    return PLAIN if layout == "cp2" else tuple(MODELS)


def configuration(model: str, layout: str) -> PretrainConfig:
    return with_layout(tiny_config(**MODELS[model]), **LAYOUTS[layout][1])


def train_all(layout: str, dtype: torch.dtype) -> dict[str, Any] | None:
    """Trains every model on the same processes; the first rank has the results."""
    found = {model: train(configuration(model, layout), dtype, steps=4) for model in models_of(layout)}
    return found if not dist.is_initialized() or dist.get_rank() == 0 else None


@cache
def results_of(layout: str, dtype: torch.dtype) -> dict[str, Any]:
    return run_ranks(train_all, LAYOUTS[layout][0], layout, dtype, timeout_s=300)[0]


@pytest.mark.parametrize(
    ("layout", "model"), [(name, m) for name in LAYOUTS if name != "one process" for m in models_of(name)]
)
def test_a_layout_trains_as_one_process(layout: str, model: str) -> None:
    assert_same(results_of(layout, torch.float32)[model], results_of("one process", torch.float32)[model], 1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_in_double_precision(model: str) -> None:
    assert_same(results_of("tp2 pp2", torch.float64)[model], results_of("one process", torch.float64)[model], 1e-11)


@pytest.mark.parametrize("model", MODELS)
def test_each_has_an_effect_and_trains(model: str) -> None:
    kept = ("layout", "style", "init_method_std", "moe_router_topk", "optimizer")
    plain = train(tiny_config(**{k: v for k, v in MODELS[model].items() if k in kept}), torch.float64, steps=4)
    found = results_of("one process", torch.float64)[model]
    assert found["losses"][0] != pytest.approx(plain["losses"][0], rel=1e-6)
    learned = [n for n in found["gradients"] if n.endswith(".sinks") or "q_norm" in n or "kv_norm" in n]
    assert bool(learned) == (model not in ("window", "off by one", "granite", "neox"))
    assert all(found["gradients"][n].abs().min() > 0 for n in learned)
