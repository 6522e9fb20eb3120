"""Statistics of differences between models over a few seeds: intervals, equivalence, the number of seeds, scaling laws.

One seed draws the same samples in all models, so differences are taken within seeds. Their own spread over a few seeds is
badly known; the spread that all trained models have in common is known better, if all scatter equally. Both are shown.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
K = TypeVar("K")


@dataclass(frozen=True)
class Difference:
    """Mean of differences within seeds, in nats per token; nan where one seed does not suffice.

    Attributes:
        half_width: of the 95 % interval by Student's t, from the spread of these differences.
        pooled_half_width: of the interval from the spread that all trained models have in common, or from their own where
            that is more than twice as wide.
        p_equivalent: probability of so small a mean if the true difference were at the margin or beyond (two one-sided
            tests): below 0.05 the models count as equally good.
        p_holm: of so large a mean if there were no difference, with the common spread, corrected for the number of models
            by Holm's method.
    """

    mean: float
    half_width: float = math.nan
    pooled_half_width: float = math.nan
    p_equivalent: float = math.nan
    p_holm: float = math.nan


@dataclass(frozen=True)
class Spread:
    """Residuals of losses after each model's and each seed's part: standard deviation, nats, and degrees of freedom.

    Differences between two models scatter by it; by their own spread where that is more than twice as wide.
    """

    sd: float
    freedom: float

    def of_mean(self, differences: np.ndarray) -> tuple[float, float]:
        """Returns the standard error of the mean of differences between two models, and its degrees of freedom."""
        count, sd, freedom = len(differences), self.sd * math.sqrt(2), self.freedom
        if count > 1 and (freedom <= 0 or differences.std(ddof=1) > 2 * sd):
            sd, freedom = float(differences.std(ddof=1)), count - 1
        return sd / math.sqrt(count), freedom

    def half_width(self, differences: np.ndarray) -> float:
        """Returns half of the 95 % interval of the mean of differences between two models, by Student's t."""
        error, freedom = self.of_mean(differences)
        return _quantile(freedom) * error if freedom > 0 else math.nan

    def p_below(self, differences: np.ndarray, bound: float = 0.0) -> float:
        """Returns the probability of so small a mean of differences between two models whose true one is a bound."""
        return _p_so_low(float(differences.mean()) - bound, *self.of_mean(differences))

    def p_less(self, differences: np.ndarray, others: np.ndarray) -> float:
        """Returns the probability of a mean of differences so far below that of other models' if both true ones are equal."""
        errors, freedoms = zip(self.of_mean(differences), self.of_mean(others), strict=True)
        return _p_so_low(float(differences.mean() - others.mean()), math.hypot(*errors), min(freedoms))

    def p_value(self, differences: np.ndarray) -> float:
        """Returns the probability of so large a mean, on either side, of differences between two equal models."""
        return 2 * float(np.minimum(self.p_below(differences), self.p_below(-differences)))

    def p_within(self, differences: np.ndarray, margin: float) -> float:
        """Returns the larger p of two one-sided tests: that the true mean is not above -margin, and not below margin."""
        return float(np.maximum(self.p_below(differences, margin), self.p_below(-differences, margin)))


def _p_so_low(beyond: float, error: float, freedom: float) -> float:
    if freedom <= 0:
        return math.nan
    if error == 0:  # which has no t
        return 0.5 + 0.5 * float(np.sign(beyond))
    return float(stats.t.cdf(beyond / error, freedom))


def common_spread(losses: Mapping[str, Sequence[float]]) -> Spread:
    """Returns the spread that models have in common within seeds, by least squares.

    Args:
        losses: of each model, one for each seed, in the same order; nan where it has none.
    """
    runs = [
        (model, seed, loss) for model, row in losses.items() for seed, loss in enumerate(row) if math.isfinite(loss)
    ]
    models, seeds = sorted({m for m, _, _ in runs}), sorted({s for _, s, _ in runs})
    parts = np.array([[m == x for x in models] + [s == x for x in seeds[1:]] for m, s, _ in runs], dtype=float)
    y = np.array([loss for _, _, loss in runs])
    best, _, rank, _ = np.linalg.lstsq(parts, y, rcond=None)
    freedom = len(runs) - int(rank)
    return Spread(math.sqrt(float(((y - parts @ best) ** 2).sum()) / freedom) if freedom else math.nan, freedom)


def differences(
    losses: Mapping[str, Sequence[float]], baseline: str, margin: float, derived: Collection[str] = ()
) -> dict[str, Difference]:
    """Returns each model's difference from a baseline, over the seeds that both have.

    Args:
        losses: of each model, one for each seed, in the same order; the baseline's too; nan where a model has none.
        margin: nats per token.
        derived: models that were made of others; they scatter otherwise than trained ones, and say nothing of these.
    """
    base = np.asarray(losses[baseline])
    found = {name: np.asarray(row) - base for name, row in losses.items() if name != baseline}
    found = {name: d[np.isfinite(d)] for name, d in found.items()}
    spread = common_spread({name: row for name, row in losses.items() if name not in derived})
    p_values = {name: spread.p_value(d) for name, d in found.items() if len(d)}
    corrected = holm(p_values)
    return {
        name: Difference(
            float(d.mean()) if len(d) else math.nan,
            own_half_width(d),
            spread.half_width(d) if len(d) else math.nan,
            p_equivalent(d, margin) if len(d) > 1 else math.nan,
            corrected.get(name, math.nan),
        )
        for name, d in found.items()
    }


def own_half_width(differences: np.ndarray) -> float:
    """Returns half of the 95 % interval of a mean of differences from their own spread; nan of fewer than two."""
    return Spread(math.nan, 0).half_width(differences) if len(differences) else math.nan


def holm(p_values: Mapping[K, float]) -> dict[K, float]:
    """Returns p values corrected for their number by Holm's step-down method; those that are nan are not counted."""
    known = sorted((key for key, p in p_values.items() if not math.isnan(p)), key=p_values.__getitem__)
    times = [min(p_values[key] * (len(known) - number), 1.0) for number, key in enumerate(known)]
    corrected = map(float, np.maximum.accumulate(times or [0.0]))
    return {key: math.nan for key in p_values} | dict(zip(known, corrected, strict=False))


def _quantile(freedom: float) -> float:
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom))


def p_equivalent(values: Sequence[float] | np.ndarray, margin: float) -> float:
    """Returns the larger p of two one-sided t-tests: that the values' mean is not above -margin, and not below margin.

    Args:
        values: at least two differences within seeds.
    """
    return Spread(math.nan, 0).p_within(np.asarray(values, dtype=float), margin)


def seeds_needed(spread: float, margin: float, power: float = 0.8) -> int:
    """Returns how many seeds decide whether two equally good models differ by less than a margin.

    Args:
        spread: standard deviation of the difference within a seed, nats per token.
        margin: nats per token.
        power: probability with which two one-sided tests at 5 % then find them equivalent.
    """
    for count in range(2, 1000):
        t = float(stats.t.ppf(0.95, count - 1))
        shift = margin * math.sqrt(count) / spread
        # Two one-sided tests of a true difference of 0, by the noncentral t (Phillips, 1990).
        if 2 * float(stats.nct.sf(t, count - 1, shift)) - 1 >= power:
            return count
    return 1000


@dataclass(frozen=True)
class ScalingPoint:
    """One run: parameters that a token uses, parameters of all routed experts, tokens, loss in nats.

    Attributes:
        model: whose shared parameters have a factor of their own; "" for a model that shares none.
    """

    model: str
    active: float
    expert: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class ScalingFit:
    """loss = floor + a * active^-alpha * (total / active)^-gamma + b * tokens^-beta, sizes in millions.

    Attributes:
        values: floor, a, alpha, gamma, b and beta by name; by model, how many of its own parameters one shared parameter is worth.
        low, high: their 95 % intervals by bootstrap; nan without any draw.
        error: mean absolute error of the fit, nats.
    """

    values: Mapping[str, float]
    low: Mapping[str, float]
    high: Mapping[str, float]
    error: float

    def predict(self, point: ScalingPoint) -> float:
        """Returns the loss that the fit expects."""
        values = np.array([self.values[name] for name in _NAMES])
        return float(_losses(values, _sizes([point]), self.values.get(point.model, 1.0))[0])


_NAMES = ("floor", "a", "alpha", "gamma", "b", "beta")


def _sizes(points: Sequence[ScalingPoint]) -> np.ndarray:
    """Returns active parameters, those of experts, and tokens [3, N], in millions."""
    return np.array([(p.active, p.expert, p.tokens) for p in points]).T / 1e6


def _losses(values: np.ndarray, sizes: np.ndarray, worth: np.ndarray | float) -> np.ndarray:
    (floor, a, alpha, gamma, b, beta), (active, expert, tokens) = values, sizes
    total = active + np.maximum(worth * expert, 0.0)
    return np.asarray(floor + a * active**-alpha * (total / active) ** -gamma + b * tokens**-beta)


def fit_scaling(points: Sequence[ScalingPoint], draws: int = 200) -> ScalingFit:
    """Fits the scaling law to runs, by least squares that forgive outliers; intervals from fits to runs drawn anew.

    Raises:
        ValueError: there are fewer runs than numbers to fit.
    """
    names = [*_NAMES, *sorted({p.model for p in points} - {""})]
    if len(points) <= len(names):
        raise ValueError(f"{len(points)} runs cannot determine {len(names)} numbers")

    def errors_of(chosen: Sequence[ScalingPoint]) -> Callable[[np.ndarray], np.ndarray]:
        sizes, measured = _sizes(chosen), np.array([p.loss for p in chosen])
        row = [names.index(p.model) if p.model else -1 for p in chosen]  # the last is the 1 of models that share none
        return lambda values: _losses(values[: len(_NAMES)], sizes, np.append(values, 1.0)[row]) - measured

    def fitted(chosen: Sequence[ScalingPoint], starts: Iterable[Sequence[float] | np.ndarray]) -> np.ndarray:
        most = np.array([min(p.loss for p in chosen), *[np.inf] * (len(names) - 1)])
        fits = [
            optimize.least_squares(
                errors_of(chosen), np.clip(start, 1e-9, most - 1e-9), bounds=(0.0, most), loss="huber", f_scale=0.01
            )
            for start in starts
        ]
        return np.asarray(min(fits, key=lambda fit: fit.cost).x)

    least, worth = min(p.loss for p in points), [1.0] * (len(names) - len(_NAMES))
    starts = [
        [least * share, least * (1 - share), alpha, 0.1, 1.0, beta, *worth]
        for share, alpha, beta in itertools.product((0.3, 0.7), (0.1, 0.4), (0.3, 0.7))
    ]
    best, rng = fitted(points, starts), np.random.default_rng(0)
    drawn = [fitted([points[i] for i in rng.integers(0, len(points), len(points))], [best]) for _ in range(draws)]
    ends = np.percentile(drawn, [2.5, 97.5], axis=0) if drawn else np.full((2, len(names)), np.nan)
    found, low, high = (dict(zip(names, map(float, row), strict=True)) for row in (best, *ends))
    return ScalingFit(found, low, high, float(np.abs(errors_of(points)(best)).mean()))
