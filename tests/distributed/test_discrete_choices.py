"""Layouts decide as one process does; where a tie makes them differ, the comparison says that it was one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.config import PretrainConfig
from megatron_samoe.parallel_state import initialize_model_parallel
from tests.harness.discrete_choices import Decision, Place, first_difference, recorded_choices, telling_ties
from tests.harness.layout_training import train
from tests.harness.ranks import run_ranks
from tests.harness.tiny import tiny_config, with_layout

pytestmark = pytest.mark.distributed

MODELS: dict[str, dict[str, Any]] = {
    "clipped": {"clip_qkv": 0.5, "init_method_std": 0.3},
    "norm router, neighbours": {
        "expert_sharing": "neighbours",
        "moe_router_score_function": "norm",
        "neighbour_unmask_steps": 2,
    },
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, {"ep": 2}),
    "tp2 sp": (2, {"tp": 2, "sp": True}),
    "cp3": (3, {"cp": 3}),
    "pp2": (2, {"pp": 2}),
}


def trained(config: PretrainConfig) -> tuple[list[float], dict[Place, Decision]] | None:
    """Returns the gradient norms of two steps, and all that was decided in them; on the first rank."""
    with recorded_choices() as choices:
        norms = train(config, torch.float32, 2)["norms"]
    decisions = choices.gathered(initialize_model_parallel(config.parallel).world)
    return (norms, decisions) if not dist.is_initialized() or dist.get_rank() == 0 else None


@pytest.mark.parametrize("model", MODELS)
def test_layouts_decide_alike_or_by_a_tie(model: str) -> None:
    config = tiny_config("moe", num_layers=2, moe_router_topk=2, seq_length=24, **MODELS[model])
    expected, decided = run_ranks(trained, 1, config)[0]
    for layout, (world, sizes) in LAYOUTS.items():
        norms, decisions = run_ranks(trained, world, with_layout(config, **sizes))[0]
        difference = first_difference(decisions, decided)
        assert difference is None or difference.is_tie, (layout, difference)
        if difference is None:
            with telling_ties(decisions, decided):
                torch.testing.assert_close(norms, expected, rtol=1e-5, atol=0.0)
