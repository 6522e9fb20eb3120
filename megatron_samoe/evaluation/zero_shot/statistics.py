"""How sure a figure is: standard errors, and whether two models differ on the same items."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_CHUNK = 250
#: Gives value [...] of sums [..., V].
Finish = Callable[[np.ndarray], np.ndarray]


def _resampled(statistic: Finish, units: int, num_samples: int, seed: int) -> np.ndarray:
    """Returns a statistic of units [..., U] drawn with replacement; equal seeds and sizes draw the same units."""
    generator = np.random.default_rng(seed)
    counts = [min(_CHUNK, num_samples - start) for start in range(0, num_samples, _CHUNK)]
    return np.concatenate([statistic(generator.integers(units, size=(count, units))) for count in counts])


def bootstrap_stderr(x_UV: np.ndarray, finish: Finish, num_samples: int = 1000, seed: int = 0) -> float:
    """Returns the standard deviation of a statistic over resampled units; nan with fewer than two units, or where one
    is not finite."""
    if x_UV.shape[0] < 2:
        return math.nan
    values = _resampled(lambda units: finish(x_UV[units].sum(-2)), x_UV.shape[0], num_samples, seed)
    return float(np.std(values, ddof=1)) if np.isfinite(values).all() else math.nan


@dataclass(frozen=True)
class McNemar:
    """The exact test on units that just one of two models gets right.

    Attributes:
        only_first, only_second: number of such units.
        p_value: two-sided, that the split of these is as uneven if both models are equally good.
    """

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Sequence[bool] | np.ndarray, second: Sequence[bool] | np.ndarray) -> McNemar:
    """Returns McNemar's exact (binomial) test of two models on the same units."""
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    assert first.shape == second.shape
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    either = only_first + only_second
    from scipy.stats import binomtest  # which takes a second to import

    return McNemar(only_first, only_second, float(binomtest(only_first, either).pvalue) if either else 1.0)


@dataclass(frozen=True)
class PairedDifference:
    """Second model less first, by paired bootstrap.

    Attributes:
        low, high: the middle 95 % of the resampled differences.
        p_value: two-sided, from the share of resampled differences on either side of 0; at least 2 / (samples + 1).

    All but the value are nan where a resampled difference is not finite.
    """

    value: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(
    first_UV: np.ndarray, second_UV: np.ndarray, finish: Finish, num_samples: int = 2000, seed: int = 0
) -> PairedDifference:
    """Returns how two models' statistics differ over the same resampled units."""
    assert first_UV.shape[0] == second_UV.shape[0]
    value = float(finish(second_UV.sum(0))) - float(finish(first_UV.sum(0)))
    with np.errstate(invalid="ignore"):  # infinity less infinity
        values = _resampled(
            lambda units: finish(second_UV[units].sum(-2)) - finish(first_UV[units].sum(-2)),
            first_UV.shape[0],
            num_samples,
            seed,
        )
    if not np.isfinite(values).all():  # a perplexity beyond the largest number says nothing of a difference
        return PairedDifference(value, math.nan, math.nan, math.nan)
    low, high = np.quantile(values, (0.025, 0.975))
    below, above = int((values <= 0).sum()), int((values >= 0).sum())
    p_value = min(1.0, 2 * (min(below, above) + 1) / (num_samples + 1))
    return PairedDifference(value, float(low), float(high), p_value)
