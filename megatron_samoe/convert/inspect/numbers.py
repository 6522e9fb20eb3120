"""Numbers of tensors, taken a slice at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Elements widened to fp64 together.
RUN = 1 << 20


@dataclass(frozen=True)
class Statistics:
    """Of one tensor's finite elements.

    Attributes:
        zeros: share of elements that are 0.
        nan, inf: how many are not a number, or infinite.
    """

    count: int
    minimum: float
    maximum: float
    mean: float
    std: float
    zeros: float
    nan: int
    inf: int

    @property
    def is_finite(self) -> bool:
        """Whether every element is a number."""
        return not self.nan and not self.inf


def _runs(t: Tensor) -> Iterator[Tensor]:
    flat = t.reshape(-1)
    for start in range(0, flat.numel(), RUN):
        yield flat[start : start + RUN].double()


def statistics(t: Tensor) -> Statistics:
    """Returns a tensor's statistics."""
    low, high, total, square, num_zero, num_nan, num_inf, num_finite = math.inf, -math.inf, 0.0, 0.0, 0, 0, 0, 0
    for x in _runs(t):
        finite = x[x.isfinite()]
        num_nan, num_inf = num_nan + int(x.isnan().sum()), num_inf + int(x.isinf().sum())
        if finite.numel():
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            total, square = total + float(finite.sum()), square + float(finite.square().sum())
            num_zero, num_finite = num_zero + int((finite == 0).sum()), num_finite + finite.numel()
    mean = total / num_finite if num_finite else math.nan
    variance = square / num_finite - mean * mean if num_finite else math.nan
    if not num_finite:
        low = high = math.nan
    std = math.sqrt(max(variance, 0.0)) if num_finite else math.nan
    return Statistics(t.numel(), low, high, mean, std, num_zero / max(t.numel(), 1), num_nan, num_inf)


@dataclass(frozen=True)
class Difference:
    """Of two tensors of one shape.

    Attributes:
        largest: of the elements' absolute differences; infinite where only one is a number.
        relative: norm of the difference over the larger of the two norms.
        num_different: elements that are not equal (two NaNs are).
    """

    largest: float
    relative: float
    num_different: int

    def is_within(self, atol: float, rtol: float) -> bool:
        """Whether the difference is within the tolerance: each element's, or the full tensor's."""
        return self.num_different == 0 or self.largest <= atol or self.relative <= rtol


def difference(a: Tensor, b: Tensor) -> Difference:
    """Returns how two tensors of one shape differ, whatever their precisions."""
    largest, square, norms, num_different = 0.0, 0.0, [0.0, 0.0], 0
    for x, y in zip(_runs(a), _runs(b), strict=True):
        same = (x == y) | (x.isnan() & y.isnan())
        num_different += int((~same).sum())
        apart = torch.where(same, 0.0, (x - y).abs()).nan_to_num(nan=math.inf)
        largest = max(largest, float(apart.max()) if apart.numel() else 0.0)
        square += float(apart.square().sum())
        for number, part in enumerate((x, y)):
            norms[number] += float(part[part.isfinite()].square().sum())
    norm = math.sqrt(max(norms))
    relative = 0.0 if square == 0 else math.sqrt(square) / norm if norm else math.inf
    return Difference(largest, relative, num_different)
