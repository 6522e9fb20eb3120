"""Maps under a budget: planted pairs are found, the runs are the best of all, a budget that none meets is refused."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from megatron_samoe.config.sharing_map import OWN, SCALED, TIED, parse_sharing
from megatron_samoe.errors import ConfigError
from megatron_samoe.fit.compress.sharing_plan import best_runs, chosen_map, sets_in_budget


def errors(seed: int, num_layers: int) -> torch.Tensor:
    error = torch.rand(num_layers, num_layers, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (error + error.T) / 2


def loss(error: torch.Tensor, runs: list[int]) -> float:
    total, start = 0.0, 0
    for size in runs:
        total += 2 / size * sum(float(error[i, j]) for i, j in combinations(range(start, start + size), 2))
        start += size
    return total


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_runs", [1, 2, 4, 6])
def test_runs_are_the_best_of_all(seed: int, max_runs: int) -> None:
    error = errors(seed, 6)
    every = [
        [b - a for a, b in zip((0, *cuts), (*cuts, 6), strict=True)]
        for count in range(max_runs)
        for cuts in combinations(range(1, 6), count)
    ]
    found = best_runs(error, max_runs)
    assert len(found) <= max_runs and sum(found) == 6
    assert loss(error, found) == pytest.approx(min(loss(error, runs) for runs in every))


def test_planted_pairs_are_found() -> None:
    error = torch.full((6, 6), 0.5, dtype=torch.float64)
    for a, b in ((1, 2), (3, 4)):
        error[a, b] = error[b, a] = 0.01
    for way in (TIED, SCALED):
        sources = parse_sharing(chosen_map(error, 4, way), 6)
        assert [s.way for s in sources] == [OWN, way, way, way, way, OWN]
        assert sources[1] == sources[2] != sources[3] == sources[4]


def test_a_budget_is_a_share_or_bytes() -> None:
    assert sets_in_budget(0.5, 100, 8) == 4 and sets_in_budget(0.49, 100, 8) == 3
    assert sets_in_budget(450, 100, 8) == 4 and sets_in_budget(1 / 3, 100, 3) == 1


@pytest.mark.parametrize("budget", [0.1, 99, 0.0, 1.5, 800, -3])
def test_a_budget_that_no_map_meets_names_those_that_can_be(budget: float) -> None:
    allowed = r"a share of all experts, 0\.125 \(one set for all layers\) to 0\.875, or bytes, 100 to 700$"
    with pytest.raises(ConfigError, match=allowed):
        sets_in_budget(budget, 100, 8)
