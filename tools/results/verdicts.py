"""The registered claims of the study, judged on the test split from the runs of a store.

docs/results/registration.md states claims and tests. A claim is judged, and its models' losses are looked at, once all of its runs
are there. Losses of these models give one spread within seeds. A model that was given up counts as not better.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from megatron_samoe.evaluation.study.plan import StudyPlan
from megatron_samoe.evaluation.study.statistics import Spread, common_spread, holm, own_half_width
from tools.results.page_figures import Models, model_name

#: How the table of verdicts begins.
HEAD = "| claim | model | from | seeds | difference | own interval | p | supported |"
#: The models that others are compared with.
FEW, MANY = "second_regime/moe of 8", "second_regime/moe of 32"

#: Claims that the table of verdicts leaves to the text and to docs/compression.md.
UNTABLED = ("G2", "own experts", "E2a, rate", "E5, others", "E6, others")

#: FEW's further seeds, which count as FEW's from when all that E1 waits for is there.
MORE = "third_own/moe of 8"

#: Studies of another depth or corpus, whose models are judged by the others' spread and add nothing to it.
APART = ("third_deep/", "third_small_corpus/")

#: Losses by model and seed.
Losses = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Claim:
    """A claim of differences, nats per token; p values of several pairs are corrected by Holm's method.

    Attributes:
        pairs: models, each with its baseline.
        waits_for: models whose runs must be there too.
        test: of the mean difference; docs/results/claims.yaml says which there are.
        than: for the test `less`, by model: another, and its baseline.
    """

    name: str
    pairs: tuple[tuple[str, str], ...]
    test: Literal["mean", "below", "within", "less", "none"]
    bound: float = 0.0
    waits_for: tuple[str, ...] = ()
    than: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """All that it compares, baselines first."""
        return list(dict.fromkeys(name for pair in self.pairs for name in reversed(pair)))

    @property
    def needs(self) -> list[str]:
        """All whose runs must be there."""
        return [*self.models, *self.waits_for, *(name for pair in self.than.values() for name in pair)]

    def p_value(self, spread: Spread, pair: tuple[str, str], differences: Callable[[str, str], np.ndarray]) -> float:
        """Returns the p of one pair; nan without a test."""
        found = differences(*pair)
        if self.test == "less":
            return spread.p_less(found, differences(*self.than[pair[0]]))
        if self.test == "below":
            return spread.p_below(found, self.bound)
        return spread.p_within(found, self.bound) if self.test == "within" else math.nan


def read_claims(path: Path) -> list[Claim]:
    """Returns the registered claims."""
    return [
        Claim(
            row["claim"],
            tuple(row["pairs"].items()),
            row["test"],
            row.get("bound", 0),
            tuple(row.get("waits_for", ())),
            row.get("than", {}),
        )
        for row in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]


CLAIMS = tuple(read_claims(Path(__file__).resolve().parents[2] / "docs/results/claims.yaml"))


@dataclass(frozen=True)
class HeldOut:
    """What is known of the test split.

    Attributes:
        trained: losses of trained models.
        derived: of models that were made of others.
        whole: models whose runs are all there.
        given_up: those of them with one seed.
        claims: that are to be judged.
    """

    trained: Losses
    derived: Losses
    whole: frozenset[str]
    given_up: frozenset[str] = frozenset()
    claims: Sequence[Claim] = field(default=CLAIMS)

    @property
    def ready(self) -> list[Claim]:
        """The claims that can be judged."""
        return [claim for claim in self.claims if self.whole.issuperset(claim.needs)]

    @property
    def judged(self) -> list[str]:
        """The models that these compare, whose losses may be looked at."""
        return list(dict.fromkeys(name for claim in self.ready for name in claim.models))

    @property
    def opened(self) -> Losses:
        """Losses of those of them that were trained, as deep as most and on the same corpus."""
        return {name: self.trained[name] for name in self.judged if name in self.trained and not name.startswith(APART)}

    @property
    def spread(self) -> Spread:
        """What these have in common."""
        return common_spread(by_seed(self.opened)) if self.opened else Spread(math.nan, 0)


def losses_on_test(plans: Mapping[str, StudyPlan], models: Models, derived: Losses) -> HeldOut:
    """Returns what is known of the test split.

    Args:
        plans: of the registered studies, by name.
        models: runs by model and seed.
        derived: losses of models that were made of others.
    """
    is_finished, given_up = dict[str, list[bool]](), set[str]()
    for study, plan in plans.items():
        given_up |= {model_name(study, *model) for model in plan.given_up()}
        for run in plan.all_runs():
            is_finished.setdefault(model_name(study, run.variant.name, run.size), []).append(plan.is_finished(run))
    trained = {name: {seed: run.validation["test_loss"] for seed, run in models[name].items()} for name in is_finished}
    seeds = {seed for name, row in trained.items() if name.startswith("second_") for seed in row}
    first = next(claim for claim in CLAIMS if MORE in claim.waits_for)
    whole = {name for name, runs in is_finished.items() if all(runs)}
    if whole.issuperset(first.waits_for):
        trained[FEW] |= trained[MORE]
    whole |= {name for name, row in derived.items() if row.keys() >= seeds}
    return HeldOut(trained, derived, frozenset(whole), frozenset(given_up))


@dataclass(frozen=True)
class Verdict:
    """What became of a claim for one model.

    Attributes:
        baseline: from which it differs.
        differences: by seed.
        half_width: of the 95 % interval of their mean.
        p: corrected; nan without a test.
    """

    claim: Claim
    model: str
    baseline: str
    differences: np.ndarray
    half_width: float
    p: float

    @property
    def mean(self) -> float:
        """Their mean."""
        return float(self.differences.mean())

    @property
    def is_supported(self) -> bool:
        """Whether the claim is, for this model."""
        return self.mean <= self.claim.bound if self.claim.test == "mean" else self.p < 0.05

    @property
    def cells(self) -> list[str]:
        """What the table shows."""
        own = own_half_width(self.differences)
        return [
            self.claim.name,
            *map(short, (self.model, self.baseline)),
            str(len(self.differences)),
            f"{self.mean:+.4f} ± {self.half_width:.4f}",
            "" if math.isnan(own) else f"± {own:.4f}",
            _p(self.p),
            "exploratory" if self.claim.test == "none" else "yes" if self.is_supported else "no",
        ]


def _p(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.3f}" if value >= 0.0005 else "< 0.001"


def judge(held_out: HeldOut) -> Iterator[Verdict]:
    """Yields a verdict for each pair of each claim that can be judged."""
    spread = held_out.spread
    rows = {name: np.array(row) for name, row in by_seed({**held_out.trained, **held_out.derived}).items()}

    def differences(model: str, base: str) -> np.ndarray:
        d: np.ndarray = rows[model] - rows[base]
        return d[np.isfinite(d)]

    for claim in held_out.ready:
        p_values = holm(
            {
                pair: 1.0 if pair[0] in held_out.given_up else claim.p_value(spread, pair, differences)
                for pair in claim.pairs
            }
        )
        for pair, p in p_values.items():
            d = differences(*pair)
            yield Verdict(claim, *pair, d, spread.half_width(d), p)


def short(model: str) -> str:
    """Returns a model's name without its study's; of one that was compressed all of it."""
    study, _, name = model.partition("/")
    return name if study.startswith(("second_", "third_")) else model.replace("/", " ")


def verdict_table(verdicts: Iterable[Verdict]) -> str:
    """Returns the table of Markdown, without the claims of `UNTABLED`."""
    return table_of(HEAD, (verdict.cells for verdict in verdicts if verdict.claim.name not in UNTABLED))


def table_of(head: str, rows: Iterable[Iterable[str]]) -> str:
    """Returns a table of Markdown; nothing without rows."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *lines, ""]) if lines else ""


def known_figures(held_out: HeldOut, verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Returns differences, both ways, half intervals and the common spread by the expressions of page_figures.py."""
    found = {"spread": held_out.spread.sd}
    for verdict in verdicts:
        a, b = short(verdict.model), short(verdict.baseline)
        found |= {f"{verdict.claim.name} {a} - {b}": verdict.mean, f"{verdict.claim.name} {b} - {a}": -verdict.mean}
        found[f"± {verdict.claim.name} {a} - {b}"] = verdict.half_width
    return found


def compressed_losses(folder: Path) -> Losses:
    """Returns the losses on the test split that `second_compression.py` and `second_late.py` kept, by `BUDGET/MODEL`."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("seed-?-*.json")):
        _, seed, budget = path.stem.split("-")
        for model, kept in json.loads(path.read_text(encoding="utf-8")).items():
            if "test_loss" in kept:
                found.setdefault(f"{budget}/{model}", {})[int(seed)] = kept["test_loss"]
    return found


def foreign_originals(held_out: HeldOut) -> list[str]:
    """Returns which originals of compressions are not the store's models."""
    return [
        f"docs/results/compression: the original of {budget}, seed {seed}, has another loss than the store's MoE of 32"
        for budget, _, model in (name.partition("/") for name in held_out.derived)
        if model == "original"
        for seed, loss in held_out.derived[f"{budget}/original"].items()
        if abs(loss - held_out.trained[MANY].get(seed, math.nan)) > 1e-5
    ]


def compressed_figures(losses: Losses) -> dict[str, float]:
    """Returns mean losses by `BUDGET MODEL`, mean differences from the original and from it trained on, by `BUDGET MODEL - original`,
    and half intervals from their own spread."""
    rows = {name: np.array(row) for name, row in by_seed(losses).items()}
    found = {short(name): float(row.mean()) for name, row in rows.items()}
    for base, of_base in rows.items():
        budget, _, original = base.partition("/")
        for name in rows if original in ("original", "original-longer") else ():
            if name.partition("/")[0] == budget and name != base:
                found[f"{short(name)} - {original}"] = float((rows[name] - of_base).mean())
                found[f"± {short(name)} - {original}"] = own_half_width(rows[name] - of_base)
    return found


def by_seed(losses: Losses) -> dict[str, list[float]]:
    """Returns one loss for each seed that any model has, in their order; nan where a model has none."""
    seeds = sorted({seed for row in losses.values() for seed in row})
    return {name: [row.get(seed, math.nan) for seed in seeds] for name, row in losses.items()}
