"""The registered claims of the study's second edition, judged on the test split from the runs of a store.

docs/results/registration.md states claims and tests. Losses of all models under Muon give one spread within seeds; a model's own
spread decides where it is more than twice that. A model with fewer seeds than its baseline was given up: it counts as not better.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
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
    """A claim of differences, nats per token; p values of several models are corrected by Holm's method.

    Attributes:
        pairs: models, each with its baseline.
        test: `mean`, the mean is at most the bound; `below`, the true mean is below it; `within`, it is no farther from zero.
    """

    name: str
    pairs: tuple[tuple[str, str], ...]
    test: Literal["mean", "below", "within"]
    bound: float = 0.0

    def p_value(self, spread: Spread, found: np.ndarray) -> float:
        """Returns the p of one model's differences; nan without a test."""
        if self.test == "mean":
            return math.nan
        return spread.p_below(found, self.bound) if self.test == "below" else spread.p_within(found, self.bound)


_FEW, _MANY = "second_regime/moe of 8", "second_regime/moe of 32"
CLAIMS = (
    Claim("G0", ((_MANY, _FEW),), "mean", -0.03),
    Claim("G0", ((_FEW, "second_regime/dense"),), "mean", -0.08),
    Claim("G1", tuple((way, _FEW) for way in _WAYS), "below"),
    Claim("G2", tuple((way, _MANY) for way in (*_WAYS, _FEW)), "within", 0.03),
    Claim("G3", (("second_combination/2 banks of 32", "second_combination/frozen"),), "below"),
    Claim(
        "G5",
        (
            ("half/healed-routers", "second_scratch/4 banks of 32"),
            ("quarter/healed-routers", "second_scratch/2 banks of 32"),
        ),
        "below",
    ),
    Claim("G5", (("half/healed-routers", "half/original-longer"),), "within", 0.02),
)

#: Losses by model and seed.
Losses = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Verdict:
    """What became of a claim for one model.

    Attributes:
        baseline: from which it differs.
        seeds: that both have.
        p: corrected; nan without a test.
    """

    claim: Claim
    model: str
    baseline: str
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
            *map(short, (self.model, self.baseline)),
            str(self.seeds),
            f"{d.mean:+.4f} ± {d.pooled_half_width:.4f}",
            "" if math.isnan(d.half_width) else f"± {d.half_width:.4f}",
            "" if math.isnan(self.p) else f"{self.p:.3f}",
            "holds" if self.holds else "does not hold",
        ]


def short(model: str) -> str:
    """Returns a model's name without its study's; of one that was compressed all of it."""
    study, _, name = model.partition("/")
    return name if study.startswith("second_") else model.replace("/", " ")


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
        a, b, mean = short(verdict.model), short(verdict.baseline), verdict.difference.mean
        found |= {f"{verdict.claim.name} {a} - {b}": mean, f"{verdict.claim.name} {b} - {a}": -mean}
        found[f"± {verdict.claim.name} {a} - {b}"] = verdict.difference.pooled_half_width
    return found


def judge(trained: Losses, derived: Losses, claims: Sequence[Claim] = CLAIMS) -> Iterator[Verdict]:
    """Yields a verdict for each model of each claim whose losses are all there.

    Args:
        trained: losses on the test split; these models tell the common spread.
        derived: those of models that were made of others.
    """
    spread = common_spread(by_seed(trained)) if trained else Spread(math.nan, 0)
    losses = by_seed({**trained, **derived})
    for claim in claims:
        yield from _judged(claim, losses, spread)


def losses_on_test(models: Models, sealed: Collection[str], claims: Sequence[Claim] = CLAIMS) -> Losses:
    """Returns the losses on the test split of the claims' trained models.

    Args:
        models: runs by model and seed.
        sealed: models whose loss on the test split must not be looked at yet.
    """
    names = dict.fromkeys(name for claim in claims for pair in claim.pairs for name in reversed(pair))
    return {
        name: {seed: run.validation["test_loss"] for seed, run in models[name].items()}
        for name in names
        if models.get(name) and name not in sealed
    }


def compressed_losses(folder: Path) -> Losses:
    """Returns the losses on the test split that `second_compression.py` kept, by `BUDGET/MODEL`."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("seed-?-*.json")):
        _, seed, budget = path.stem.split("-")
        for model, kept in json.loads(path.read_text(encoding="utf-8")).items():
            if "test_loss" in kept:
                found.setdefault(f"{budget}/{model}", {})[int(seed)] = kept["test_loss"]
    return found


def healed_losses(folder: Path) -> Losses:
    """Returns the losses on validation text of models with all weights healed, of a half of the bytes, as `all weights/MODEL`."""
    found: dict[str, dict[int, float]] = {}
    for seed, losses in json.loads((folder / "all_weights.json").read_text(encoding="utf-8")).items():
        for model, loss in losses.items():
            found.setdefault(f"all weights/{model}", {})[int(seed)] = loss
    return found


def compressed_figures(losses: Losses) -> dict[str, float]:
    """Returns mean differences from the original, and from it trained on, by `BUDGET MODEL - original`, and half intervals from
    their own spread."""
    found: dict[str, float] = {}
    rows = by_seed(losses)
    for base in rows:
        budget, _, original = base.partition("/")
        if original not in ("original", "original-longer"):
            continue
        of_budget = {name: row for name, row in rows.items() if name.partition("/")[0] == budget}
        for name, difference in differences(of_budget, base, 0.0).items():
            found[f"{short(name)} - {original}"] = difference.mean
            found[f"± {short(name)} - {original}"] = difference.half_width
    return found


def by_seed(losses: Losses) -> dict[str, list[float]]:
    """Returns one loss for each seed that any model has, in their order; nan where a model has none."""
    seeds = sorted({seed for row in losses.values() for seed in row})
    return {name: [row.get(seed, math.nan) for seed in seeds] for name, row in losses.items()}


def _judged(claim: Claim, losses: dict[str, list[float]], spread: Spread) -> Iterator[Verdict]:
    if not {name for pair in claim.pairs for name in pair} <= losses.keys():
        return
    both, given_up = dict[str, np.ndarray](), set[str]()
    for model, baseline in claim.pairs:
        d = np.asarray(losses[model]) - np.asarray(losses[baseline])
        both[model] = d[np.isfinite(d)]
        if len(both[model]) < np.isfinite(losses[baseline]).sum():
            given_up.add(model)
    p_values = holm({name: 1.0 if name in given_up else claim.p_value(spread, d) for name, d in both.items()})
    for model, baseline in claim.pairs:
        found = differences({name: losses[name] for name in (model, baseline)}, baseline, claim.bound)[model]
        shown = replace(found, pooled_half_width=spread.half_width(len(both[model])))
        holds = found.mean <= claim.bound if claim.test == "mean" else p_values[model] < 0.05
        yield Verdict(claim, model, baseline, len(both[model]), shown, p_values[model], holds)
