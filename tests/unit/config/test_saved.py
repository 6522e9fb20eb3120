"""Configurations of earlier versions keep their meaning."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_samoe.config.cli import from_mapping, to_mapping
from megatron_samoe.config.saved import upgrade
from tests.harness.tiny import tiny_config


def saved_before(**options: Any) -> dict[str, Any]:
    """A configuration as version 0.1 wrote it: whole, without the options that came later."""
    mapping = to_mapping(tiny_config("moe", **options))
    for name in ("moe_scale_output_init", "moe_router_init_method_std", "moe_aux_loss_group_size"):
        del mapping["moe"][name]
    return mapping


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({"moe_router_topk": 1}, 128),
        ({"moe_router_topk": 2}, 128),
        ({"moe_router_topk": 2, "moe_ffn_hidden_size": 24}, 24),
        ({"moe_router_topk": 2, "style": "llama", "ffn_hidden_size": None}, 64),
    ],
)
def test_experts_of_older_models_stay_as_wide_as_the_dense_mlp(options: dict[str, Any], width: int) -> None:
    assert from_mapping(upgrade(saved_before(**options)), "test").expert_ffn_size == width


def test_what_this_version_saved_is_not_touched() -> None:
    mapping = to_mapping(tiny_config("moe", moe_router_topk=2))
    assert upgrade(mapping) is mapping and from_mapping(mapping, "test").expert_ffn_size == 64


@pytest.mark.parametrize(
    "damage", [{"moe": None}, {"model": []}, {"model": {"hidden_size": "wide", "swiglu": True}}, {}]
)
def test_damaged_configurations_pass_through(damage: dict[str, Any]) -> None:
    upgrade({**saved_before(moe_router_topk=2), **damage})
