"""Training without kept logits, in every layout as with them in one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.tensor_parallel import cross_entropy
from tests.harness.layout_training import assert_same, train
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks
from tests.harness.tiny import tiny_config, with_layout

pytestmark = pytest.mark.distributed

MODELS: dict[str, dict[str, Any]] = {
    "tied": {"layout": "samoe"},
    "capped": {"layout": "dense", "style": "llama", "final_logit_softcapping": 1.5, "logits_scaling": 2.5},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "zero dp2": (2, {"zero": True}),
    "tp2": (2, {"tp": 2}),
    "tp2 sp": (2, {"tp": 2, "sp": True}),
    "pp2 vpp": (2, {"pp": 2, "vpp": 1}),
    "cp2": (2, {"cp": 2}),
}


def train_all(layout: str, dtype: torch.dtype, fused: bool) -> dict[str, Any] | None:
    cross_entropy.CHUNK_ELEMENTS = 1000  # some ten tokens
    found = {}
    for model, options in MODELS.items():
        given = {**options, "init_method_std": 0.2, "fused_linear_cross_entropy": fused}
        config = with_layout(tiny_config(**given), **LAYOUTS[layout][1])
        found[model] = train(config, dtype, steps=3)
    return found if not dist.is_initialized() or dist.get_rank() == 0 else None


@cache
def results_of(layout: str, dtype: torch.dtype, fused: bool) -> dict[str, Any]:
    return run_ranks(train_all, LAYOUTS[layout][0], layout, dtype, fused, timeout_s=300)[0]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", first_by_day(LAYOUTS, 2))
def test_a_layout_trains_as_one_process_with_logits(layout: str, model: str) -> None:
    dtype, tolerance = (torch.float64, 1e-11) if layout == "tp2" else (torch.float32, 1e-5)
    expected = results_of("one process", dtype, False)[model]
    assert_same(results_of(layout, dtype, True)[model], expected, tolerance)
