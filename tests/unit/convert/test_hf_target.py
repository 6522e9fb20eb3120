"""The class of an export follows from what the model computes, and its tensors hold every element of ours once."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_samoe.convert.hf.target import choose_target
from megatron_samoe.convert.native import NativeModel
from megatron_samoe.errors import ConfigError
from tests.harness.tables import table
from tests.harness.tiny import VOCAB_SIZE, tiny_config

TABLE = table(__file__)
MOE: dict[str, Any] = {"style": "llama", "moe_router_topk": 2}


def model(layout: str, **options: Any) -> NativeModel:
    return NativeModel(tiny_config(layout, **options), VOCAB_SIZE)


@pytest.mark.parametrize(("layout", "options", "family"), TABLE["taken"])
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


@pytest.mark.parametrize(("layout", "options", "wanted", "fold", "message"), TABLE["refused"])
def test_impossible_targets_are_refused(
    layout: str, options: dict[str, Any], wanted: str, fold: bool, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_target(model(layout, **options), wanted, fold)
