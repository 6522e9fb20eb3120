"""The registered claims of the study's second edition, judged on the test split from the runs of a store.

docs/results/registration.md states claims and tests. Losses of all models under Muon give one spread within seeds; a model's own
spread decides where it is more than twice that. A model with fewer seeds than its baseline was given up: it counts as not better.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from megatron_samoe.evaluation.study.statistics import Difference, Spread, common_spread, differences, holm
from tools.results.page_figures import Models

#: How the table of verdicts begins.
HEAD = "| claim | model | from | seeds | difference | own interval | p | verdict |"

_WAYS = (
    *(f"second_sharing/{way}" for way in ("8 banks of 8", "4 banks of 16")),
    "second_combination/2 banks of 32",
    *(f"second_sharing/pool, {router}" for router in ("norm", "softmax", "locked")),
    *(f"second_sharing/{way}" for way in ("neighbours", "tied middle", "scaled")),
)


@dataclass(frozen=True)
class Claim:
    """A claim of differences from a baseline, nats per token; p values of several models are corrected by Holm's method.

    Attributes:
        test: `mean`, the mean is at most the bound; `below`, the true mean is below it; `within`, it is no farther from zero.
    """

    name: str
    models: tuple[str, ...]
    baseline: str
    test: Literal["mean", "below", "within"]
    bound: float = 0.0

    def p_value(self, spread: Spread, found: np.ndarray) -> float:
        """Returns the p of one model's differences; nan without a test."""
        if self.test == "mean":
            return math.nan
        return spread.p_below(found, self.bound) if self.test == "below" else spread.p_within(found, self.bound)


CLAIMS = (
    Claim("G0", ("second_regime/moe of 32",), "second_regime/moe of 8", "mean", -0.03),
    Claim("G0", ("second_regime/moe of 8",), "second_regime/dense", "mean", -0.08),
    Claim("G1", _WAYS, "second_regime/moe of 8", "below"),
    Claim("G2", (*_WAYS, "second_regime/moe of 8"), "second_regime/moe of 32", "within", 0.03),
    Claim("G3", ("second_combination/2 banks of 32",), "second_combination/frozen", "below"),
)


@dataclass(frozen=True)
class Verdict:
    """What became of a claim for one model.

    Attributes:
        seeds: that both have.
        p: corrected; nan without a test.
    """

    claim: Claim
    model: str
    seeds: int
    difference: Difference
    p: float
    holds: bool

    @property
    def cells(self) -> list[str]:
        """What the table shows."""
        d = self.difference
        return [
            self.claim.name,
            *map(short, (self.model, self.claim.baseline)),
            str(self.seeds),
            f"{d.mean:+.4f} ± {d.pooled_half_width:.4f}",
            "" if math.isnan(d.half_width) else f"± {d.half_width:.4f}",
            "" if math.isnan(self.p) else f"{self.p:.3f}",
            "holds" if self.holds else "does not hold",
        ]


def short(model: str) -> str:
    """Returns a model's name without its study's."""
    return model.partition("/")[2]


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Returns the table of Markdown."""
    return (
        "\n".join([HEAD, "|---" * (HEAD.count("|") - 1) + "|", *(f"| {' | '.join(v.cells)} |" for v in verdicts)])
        + "\n"
    )


def known_figures(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Returns differences, both ways, and half intervals by the expressions of page_figures.py."""
    found: dict[str, float] = {}
    for verdict in verdicts:
        a, b, mean = short(verdict.model), short(verdict.claim.baseline), verdict.difference.mean
        found |= {f"{verdict.claim.name} {a} - {b}": mean, f"{verdict.claim.name} {b} - {a}": -mean}
        found[f"± {verdict.claim.name} {a} - {b}"] = verdict.difference.pooled_half_width
    return found


def judge(models: Models, sealed: Collection[str], claims: Sequence[Claim] = CLAIMS) -> Iterator[Verdict]:
    """Yields a verdict for each model of each claim whose runs are all there.

    Args:
        models: runs by model and seed.
        sealed: models whose loss on the test split must not be looked at yet.
    """
    losses = test_losses(models, sealed, claims)
    spread = common_spread(losses) if losses else Spread(math.nan, 0)
    for claim in claims:
        yield from _judged(claim, losses, spread)


def test_losses(models: Models, sealed: Collection[str], claims: Sequence[Claim] = CLAIMS) -> dict[str, list[float]]:
    """Returns the losses on the test split of the claims' models that are not sealed, one for each seed; nan where one has none."""
    names = dict.fromkeys(name for claim in claims for name in (claim.baseline, *claim.models))
    open_runs = {name: models[name] for name in names if models.get(name) and name not in sealed}
    seeds = sorted({seed for runs in open_runs.values() for seed in runs})
    return {
        name: [runs[s].validation["test_loss"] if s in runs else math.nan for s in seeds]
        for name, runs in open_runs.items()
    }


def _judged(claim: Claim, losses: dict[str, list[float]], spread: Spread) -> Iterator[Verdict]:
    if not {*claim.models, claim.baseline} <= losses.keys():
        return
    rows = {name: losses[name] for name in (*claim.models, claim.baseline)}
    base = np.asarray(losses[claim.baseline])
    both = {name: np.asarray(losses[name]) - base for name in claim.models}
    both = {name: d[np.isfinite(d)] for name, d in both.items()}
    whole = np.isfinite(base).sum()
    p_values = holm({n: claim.p_value(spread, d) if len(d) == whole else 1.0 for n, d in both.items()})
    found = differences(rows, claim.baseline, claim.bound)
    for name, d in both.items():
        shown = replace(found[name], pooled_half_width=spread.half_width(len(d)))
        holds = bool(d.mean() <= claim.bound) if claim.test == "mean" else p_values[name] < 0.05
        yield Verdict(claim, name, len(d), shown, p_values[name], holds)
