"""Whether routers use their experts: what is said of every logged step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def load_entropy(counts_E: Tensor) -> float:
    """Returns the entropy of a layer's experts' shares of assignments, over log E: 1 is even, 0 one expert."""
    if len(counts_E) == 1:
        return 1.0
    shares_E = counts_E.double() / counts_E.sum().clamp_min(1)
    return (shares_E.xlogy(shares_E).sum().abs() / math.log(len(counts_E))).item()


@dataclass(frozen=True)
class RouterHealth:
    """How evenly all layers' experts were used in a step.

    Attributes:
        load_entropy: of each MoE layer, see `load_entropy`.
        largest_expert_share: share of a layer's tokens that chose its fullest expert, the largest of any layer.
        idle_experts: experts of all layers without a token.
        dropped_fraction: share of routed tokens beyond the capacity.
    """

    load_entropy: list[float]
    largest_expert_share: float
    idle_experts: int
    dropped_fraction: float

    @property
    def least_load_entropy(self) -> float:
        """The least load entropy of any layer."""
        return min(self.load_entropy)

    @staticmethod
    def of(counts: Sequence[Tensor], num_tokens: int, num_dropped: float) -> RouterHealth:
        """Returns the health of a global batch, from counts_E of each layer."""
        together = torch.cat(list(counts))
        return RouterHealth(
            [load_entropy(counts_E) for counts_E in counts],
            float(together.max()) / num_tokens,
            int((together == 0).sum()),
            num_dropped / max(float(together.sum()), 1.0),
        )
