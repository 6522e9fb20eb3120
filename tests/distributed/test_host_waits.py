"""Host waits of expert-parallel ranks, counted as in tests/unit/moe/test_on_a_gpu.py."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks
from tests.harness.wait_figures import Figures, figures


def on_rank(world: int, cases: list[tuple[str, str, dict[str, Any]]]) -> list[Figures]:
    return [figures(way, style, world=world, **options) for way, style, options in cases]


@pytest.mark.distributed
@pytest.mark.parametrize("world", first_by_day([2, 4]))
def test_a_layer_waits_once_for_the_sizes_of_messages(world: int) -> None:
    """A rank's own are 4 / world of the four micro-batches of a step."""
    capacity: dict[str, Any] = {"moe_expert_capacity_factor": 1.0}
    ways = ("moe", "samoe", "samoe layer", "tied", "pool")
    cases = [(way, "gelu", capacity if i % 2 else {}) for i, way in enumerate(ways)]
    cases += [(way, "swiglu", {} if i % 2 else capacity) for i, way in enumerate(ways)]
    cases += [("moe", "swiglu", {"moe_shared_expert_intermediate_size": 16})]
    cases += [("samoe", "gelu", {"moe_dispatch_chunks": 2, "samoe_combine": "step"})] if world == 2 else []
    for found in run_ranks(on_rank, world, world, cases):
        for case, each in zip(cases, found, strict=True):
            assert each.totals == (1, 0, 4 * (4 // world) + 1), (case, each)
