"""Metrics as statistics of sums, so that units can be resampled and two models compared on the same units.

A metric is one vector per unit, x_UV (a unit is an item, a question of several items, or a text), and a function of the
vectors' sum: accuracy is sum(right) / sum(1), F1 is 2 sum(hits) / (sum(yes) + sum(gold)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_samoe.evaluation.zero_shot.statistics import Finish, bootstrap_stderr

#: Metrics for which the best constant choice is shown.
SHARES_OF_ITEMS = ("acc", "acc_norm", "acc_bytes", "acc_per_answer")


@dataclass(frozen=True)
class MetricResult:
    """One metric of one task.

    Attributes:
        value: as it is computed, shares from 0 to 1.
        stderr: of the mean of units, or by bootstrap over units; nan where there is one unit.
        in_percent: shown times 100.
        x_UV: what the value is computed from; no unit where that cannot be had.
        finish: of sums over units.
    """

    value: float
    stderr: float = math.nan
    in_percent: bool = False
    x_UV: np.ndarray = field(default_factory=lambda: np.empty((0, 2)), repr=False)
    finish: Finish = field(default=lambda sums: ratio(sums), repr=False)

    @property
    def is_binary(self) -> bool:
        """Whether the value is a share of units that are right."""
        return self.finish is ratio and set(np.unique(self.x_UV[:, 0])) <= {0.0, 1.0}


def ratio(sums: np.ndarray, below: int = 1, above: int = 0) -> np.ndarray:
    """Returns one column's sum over another's."""
    return np.asarray(sums[..., above] / sums[..., below])


def perplexity(sums: np.ndarray, column: int = 1) -> np.ndarray:
    """Returns the perplexity per unit that a column counts; infinity where that is beyond all numbers."""
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(-ratio(sums, column)))


def measure(x_UV: np.ndarray, finish: Finish = ratio, in_percent: bool = False) -> MetricResult:
    """Returns a metric's value and standard error."""
    units = x_UV.shape[0]
    with np.errstate(invalid="ignore"):  # log-likelihoods may be infinite
        value = float(finish(x_UV.sum(0)))
        if finish is ratio:
            stderr = float(np.std(x_UV[:, 0], ddof=1)) / math.sqrt(units) if units > 1 else math.nan
        else:
            stderr = bootstrap_stderr(x_UV, finish) if np.isfinite(x_UV).all() else math.nan
    return MetricResult(value, stderr, in_percent, x_UV, finish)


def means(values: Sequence[float], finish: Finish = ratio) -> MetricResult:
    """Returns a function of the mean over items; shares of right items, which none exceeds, are in percent."""
    column = np.array(values, dtype=np.float64)
    is_share = finish is ratio and bool(((column >= 0) & (column <= 1)).all())
    return measure(np.stack((column, np.ones_like(column)), axis=1), finish, is_share)


def _f1(hits: np.ndarray, said: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Returns 2 hits / (said + gold), 0 where that is 0 / 0."""
    total = said + gold
    return np.asarray(np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0))


def of_questions(said: Sequence[bool], gold: Sequence[bool], questions: Sequence[str]) -> dict[str, MetricResult]:
    """Returns MultiRC's four figures of yes or no to each of several answers; docs/evaluation.md says why they belong together.

    Args:
        questions: name of each answer's question; its answers need not be together.
    """
    x_NV = np.stack([np.array(x, dtype=np.float64) for x in (said, gold)], axis=1)
    said_N, gold_N = x_NV.T
    x_NV = np.stack((said_N == gold_N, np.ones_like(said_N), said_N, gold_N, said_N * gold_N), axis=1)
    number_of = {name: number for number, name in enumerate(dict.fromkeys(questions))}
    x_UV = np.zeros((len(number_of), 5))
    np.add.at(x_UV, [number_of[name] for name in questions], x_NV)
    exact = (x_UV[:, 0] == x_UV[:, 1]).astype(np.float64)
    return {
        "acc_per_answer": measure(x_UV, lambda sums: ratio(sums), in_percent=True),
        "em": means(list(exact)),
        "f1a": measure(x_UV, lambda s: _f1(s[..., 4], s[..., 2], s[..., 3]), in_percent=True),
        "yes_share": measure(x_UV, lambda sums: ratio(sums, above=2), in_percent=True),
    }


def of_texts(x_UV: np.ndarray) -> dict[str, MetricResult]:
    """Returns the perplexities of texts.

    Args:
        x_UV: (log-likelihood, tokens, bytes, words) of each text.
    """
    finishes: dict[str, Finish] = {
        "token_perplexity": perplexity,
        "byte_perplexity": lambda sums: perplexity(sums, 2),
        "word_perplexity": lambda sums: perplexity(sums, 3),
        "bits_per_byte": lambda sums: -ratio(sums, 2) / np.log(2.0),
    }
    return {name: measure(x_UV, finish) for name, finish in finishes.items()}
