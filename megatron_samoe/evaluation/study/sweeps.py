"""The best value of an option: a parabola through losses over the value's logarithm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Optimum:
    """Where a sweep's loss is least.

    Attributes:
        value: of the option.
        loss: nats per token there, by the parabola.
        edge: the side of the range where the best value that was tried is; the optimum may then be beyond it.
    """

    value: float
    loss: float
    edge: Literal["low", "high"] | None = None


def optimum(losses: Mapping[float, float], between: bool = True) -> Optimum:
    """Returns the optimum of a sweep of at least three values: the vertex of the parabola through the best value and its
    neighbours over log(value), or the best value itself where it is at an edge or next to a run that diverged.

    Args:
        losses: by value; nan or inf where a run diverged.
        between: False takes the best value itself, never a vertex.
    """
    values = sorted(losses)
    known = [v for v in values if math.isfinite(losses[v])]
    if not known:
        return Optimum(values[0], math.inf, "low")
    best = min(known, key=lambda v: losses[v])
    index = values.index(best)
    if index == 0:
        return Optimum(best, losses[best], "low")
    if best == known[-1]:  # the range does not extend to a value that diverged
        return Optimum(best, losses[best], "high" if best == values[-1] else None)
    near = values[index - 1 : index + 2]
    if not between or not all(math.isfinite(losses[v]) for v in near):
        return Optimum(best, losses[best])
    curve = np.polyfit(np.log(near), [losses[v] for v in near], 2)
    if curve[0] <= 0:
        return Optimum(best, losses[best])
    at = -curve[1] / (2 * curve[0])
    return Optimum(float(np.exp(at)), float(np.polyval(curve, at)))


def extended(values: list[float], edge: Literal["low", "high"]) -> float:
    """Returns the next value beyond an edge of a range, in its own ratio."""
    return values[0] ** 2 / values[1] if edge == "low" else values[-1] ** 2 / values[-2]
