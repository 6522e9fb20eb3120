"""Which layers are to share, under a budget of expert bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_samoe.config.sharing_map import OWN, ExpertSource, Way, renumbered, written_map
from megatron_samoe.errors import ConfigError


@dataclass(frozen=True)
class SharingPlan:
    """A map of --expert-sharing for all MoE layers, and the banks of those that combine."""

    sharing: str
    num_banks: int = 1


def sets_in_budget(budget: float, layer_bytes: int, num_layers: int) -> int:
    """Returns how many layers' experts a budget holds.

    Args:
        budget: a share of all experts below 1, or bytes.

    Raises:
        ConfigError: it holds not one, or all of them.
    """
    limit = budget * layer_bytes * num_layers if budget < 1 else budget
    sets = int(limit / layer_bytes + 1e-9)
    if not 1 <= sets < num_layers:
        shares = f"{1 / num_layers:.4g} (one set for all layers) to {1 - 1 / num_layers:.4g}"
        numbers = f"{layer_bytes:,} to {layer_bytes * (num_layers - 1):,}"
        raise ConfigError("--budget", budget, f"must be a share of all experts, {shares}, or bytes, {numbers}")
    return sets


def chosen_map(error_LL: Tensor, max_sets: int, way: Way) -> str:
    """Returns the map of runs of neighbouring layers, at most `max_sets` of them, that loses least.

    Args:
        error_LL: what each pair of layers loses by sharing one set. A run loses twice the sum over its pairs by its size, as
            the squared distance of points from their mean is.
        way: tied or scaled.
    """
    runs = best_runs(error_LL, max_sets)
    sources = [
        ExpertSource(OWN) if size == 1 else ExpertSource(way, number)
        for number, size in enumerate(runs)
        for _ in range(size)
    ]
    return written_map(renumbered(sources))


def best_runs(error_LL: Tensor, max_runs: int) -> list[int]:
    """Returns the sizes of the runs, in order: at most `max_runs`, of the least summed loss."""
    num_layers = len(error_LL)

    def cost(start: int, end: int) -> float:
        pairs = torch.triu(error_LL[start:end, start:end].double(), 1).sum()
        return 2 * float(pairs) / (end - start)

    costs = {(i, j): cost(i, j) for i in range(num_layers) for j in range(i + 1, num_layers + 1)}
    best: list[tuple[float, tuple[int, ...]]] = [
        (0.0 if end == 0 else float("inf"), ()) for end in range(num_layers + 1)
    ]
    for _ in range(max_runs):
        # One run more at the end, or none.
        best = [
            min(
                [best[end], *((best[i][0] + costs[i, end], (*best[i][1], end - i)) for i in range(end))],
                key=lambda b: b[0],
            )
            for end in range(num_layers + 1)
        ]
    return list(best[num_layers][1])
