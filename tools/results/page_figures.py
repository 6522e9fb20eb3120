"""Figures on a page of results, recomputed from the runs of a store.

After a paragraph or a table stands what its figures are, in their order, in a comment that readers do not see:

    The pool ends 0.065 ± 0.033 nats behind the MoE.

    <!-- figures: pool - moe; ± pool - moe -->

Figures are numbers with a point, but for those in code and in links. On the page of results a paragraph or table with a figure of two
places or more must have such a comment, or one that says where its figures are from: `<!-- figures from records that were not kept -->`.
On other pages tables alone must; those of speeds are in tools/results/measured.py.

| written | is |
|---|---|
| `A` | validation loss of the model A, mean over seeds; `A #1` of seed 1 |
| `A - B` | mean difference within the seeds that both have; `A - B #1` of seed 1 |
| `± A - B` | half of its 95 % interval from these differences |
| `pooled A - B of C and D` | half of its interval from the spread that the models A, B, C and D have in common |
| `train A #1 at 800..4800/400` | mean training loss of the logged steps of the last 400, up to each of these steps; of `A - B` too |
| `valid A at 1200` | validation loss at a step |
| `total A`, `experts A`, `active A` | parameters, in millions |
| `entropy A #1 at 100` | least load entropy of any layer in the last record up to a step; without `at`, at the end |
| `lowest entropy A`, `largest share A` | worst of all seeds, after the first 200 steps: least load entropy, largest share of one expert |
| `idle A`, `most idle A` | worst of all seeds: part of the logged steps after these with idle experts; most experts that were idle in one |
| `= 0.6` | a number that is no result |
| `G0 A - B`, `± G0 A - B` | a verdict's difference and interval, and what else `results_check.py` knows by name |
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from megatron_samoe.errors import DataError
from megatron_samoe.evaluation.run_summary import RunSummary
from megatron_samoe.evaluation.study.plan import StudyPlan
from megatron_samoe.evaluation.study.statistics import common_spread, own_half_width

#: Runs of each model by seed.
Models = Mapping[str, Mapping[int, RunSummary]]

#: Which figures of a page must have a source.
Told = Literal["all", "tables"]

#: Steps after which routing is no longer that of a beginning.
SETTLED = 200

_COMMENT = re.compile(r"^<!-- figures(?P<source> from)?:?\s+(?P<text>.*?)\s*-->$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.,])[-+]?\d+\.\d+(?!\.?\d|e-)")
_NO_FIGURES = re.compile(r"`[^`]*`|\]\([^)]*\)|arXiv:\S+")


@dataclass(frozen=True)
class Block:
    """A paragraph or table, from one line of a page on, with the comment that follows it, if one does."""

    line: int
    text: str
    comment: str | None
    is_elsewhere: bool = False

    def numbers(self) -> Iterator[re.Match[str]]:
        """Yields its figures."""
        return _NUMBER.finditer(without_code(self.text))


def without_code(text: str) -> str:
    """Returns a text as long, with blanks in place of code, links and numbers of papers."""
    return _NO_FIGURES.sub(lambda found: " " * len(found[0]), text)


def blocks_of(page: str) -> list[Block]:
    """Returns the paragraphs and tables of a page: what empty lines part."""
    found: list[Block] = []
    for part in re.finditer(r"(?:^[^\n]*\S[^\n]*\n?)+", page, re.MULTILINE):
        if part[0].startswith("    "):
            continue  # code
        comment = _COMMENT.fullmatch(part[0].strip())
        if comment and found:
            last = found.pop()
            found.append(Block(last.line, last.text, comment["text"], bool(comment["source"])))
        else:
            found.append(Block(page.count("\n", 0, part.start()) + 1, part[0], None))
    return found


def models_of(plans: Mapping[str, StudyPlan], runs: Mapping[str, RunSummary]) -> Models:
    """Returns the runs of studies by their models' names: `MODEL`, of a named study `STUDY/MODEL`, of a size `MODEL, SIZE`, of a
    sweep `MODEL@VALUE`; and each run by its key.

    Args:
        plans: by the studies' names.
        runs: of a store, by key; models without any are there too, so that a name is told from a run that is missing.
    """
    models: dict[str, dict[int, RunSummary]] = {key: {run.config.training.seed: run} for key, run in runs.items()}
    for study, plan in plans.items():
        for run in plan.all_runs():
            name = model_name(study, run.variant.name, run.size)
            found = models.setdefault(name if run.swept is None else f"{name}@{run.swept:g}", {})
            if plan.is_settled(run) and plan.key_of(run) in runs:
                found[run.seed] = runs[plan.key_of(run)]
    return models


def model_name(study: str, variant: str, size: str) -> str:
    """Returns what pages and claims call a study's model; its study and its size may have no name."""
    model = f"{variant}, {size}" if size else variant
    return f"{study}/{model}" if study else model


def wrong_figures(
    page: str,
    models: Models,
    told: Told = "all",
    measured: Collection[str] = (),
    known: Mapping[str, float] = MappingProxyType({}),
) -> list[str]:
    """Returns what is wrong with a page: figures that differ from the runs, or of which nothing says what they are.

    Args:
        told: of which figures of two places or more something must be said.
        measured: how tables begin that are recomputed elsewhere.
        known: values of expressions that name no run.
    """
    problems = []
    for block in blocks_of(page):
        numbers = [match[0] for match in block.numbers()]
        if block.is_elsewhere:
            continue
        if block.comment is None:
            long = [n for n in numbers if len(n.partition(".")[2]) > 1]
            needs = told == "all" or block.text.startswith("|")
            if long and needs and not block.text.startswith(tuple(measured)):
                problems.append(f"line {block.line}: nothing says what {', '.join(long)} is")
            continue
        try:
            expected = list(figures(block.comment, models, known))
        except DataError as error:
            problems.append(f"line {block.line}: {error}")
            continue
        if len(expected) != len(numbers):
            problems.append(f"line {block.line}: has {len(numbers)} figures, and its comment {len(expected)}")
        problems += [
            f"line {block.line}: {number} is {like(number, value)} by the store ({name})"
            for number, (name, value) in zip(numbers, expected, strict=False)
            if like(number, value) != number
        ]
    return problems


def rewritten(page: str, models: Models, known: Mapping[str, float] = MappingProxyType({})) -> str:
    """Returns a page whose figures are those of the runs, as many as its comments name; what `wrong_figures`
    cannot read, or count, stays."""
    for block in blocks_of(page):
        if block.comment is not None and not block.is_elsewhere:
            text = block.text
            try:
                pairs = list(zip(block.numbers(), figures(block.comment, models, known), strict=True))
            except (DataError, ValueError):  # a run that is not there, or another number of figures
                continue
            for number, (_, value) in reversed(pairs):
                text = f"{text[: number.start()]}{like(number[0], value)}{text[number.end() :]}"
            page = page.replace(block.text, text, 1)
    return page


def with_table(page: str, table: str) -> str:
    """Returns a page with a generated table in place of the one that begins with the same line, if it has one."""
    head = table.partition("\n")[0]
    return re.sub(rf"^{re.escape(head)}\n(?:\|.*\n)*", lambda _: table, page, flags=re.MULTILINE)


def worst_routing(runs: Collection[RunSummary]) -> list[float]:
    """Returns the worst of runs, after the first steps: least load entropy, largest share of one expert, most idle experts."""
    words = ("lowest entropy", "largest share", "most idle")
    return [_WORST[word]([_QUANTITIES[word](None)(run) for run in runs]) for word in words]


def like(number: str, value: float) -> str:
    """Returns a value with as many places as a printed number, and with a sign and commas where that has them."""
    form = ("+" if number[0] in "+-" else "") + ("," if "," in number else "")
    return f"{value:{form}.{len(number.partition('.')[2])}f}"


def figures(
    comment: str, models: Models, known: Mapping[str, float] = MappingProxyType({})
) -> Iterator[tuple[str, float]]:
    """Yields each expression of a comment with its value, several of one that names several steps.

    Raises:
        DataError: an expression is not understood, or the store has no such run.
    """
    for expression in filter(None, (part.strip() for part in comment.replace("\n", " ").split(";"))):
        try:
            values = [known[expression]] if expression in known else list(_values(expression, models))
        except (KeyError, IndexError, ValueError) as error:
            raise DataError(f"{expression!r}: its runs have no such record ({error})") from None
        yield from ((expression, value) for value in values)


def _values(expression: str, models: Models) -> Iterator[float]:
    if expression.startswith("= "):
        yield float(expression[2:])
        return
    body, _, steps = expression.partition(" at ")
    body, _, others = body.partition(" of ") if body.startswith("pooled ") else (body, "", "")
    body, _, seed = body.partition(" #")
    word = next((w for w in _QUANTITIES if body.startswith(f"{w} ")), "")
    names = [name.strip() for name in body[len(word) :].split(" - ")]
    chosen = [_runs(name, int(seed) if seed else None, models, expression) for name in names]
    family = [_runs(name.strip(), None, models, expression) for name in others.split(" and ")] if others else []
    for step in _steps(steps):
        of_run = _QUANTITIES[word](step)
        rows = [{s: of_run(run) for s, run in runs.items()} for runs in chosen]
        if word in _WORST:
            yield _WORST[word]([value for row in rows for value in row.values()])
        elif word in ("±", "pooled"):
            yield _half_width(word, rows, [{s: of_run(run) for s, run in runs.items()} for runs in family])
        else:
            both = set(rows[0]).intersection(*rows[1:])
            if not both:
                raise DataError(f"{expression!r}: the store has no seed of both")
            yield statistics.mean(rows[0][s] - (rows[1][s] if len(rows) > 1 else 0.0) for s in sorted(both))


def _runs(name: str, seed: int | None, models: Models, expression: str) -> Mapping[int, RunSummary]:
    runs = models.get(name)
    if runs is None:
        raise DataError(f"{expression!r} names {name!r}, which no study has")
    runs = {s: run for s, run in runs.items() if seed in (None, s)}
    if not runs:
        raise DataError(f"{expression!r}: the store has no run of {name}{'' if seed is None else f' with seed {seed}'}")
    return runs


def _steps(text: str) -> list[tuple[int, int] | None]:
    """Returns pairs of a step and the number of steps up to it."""
    if not text:
        return [None]
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?(?:/(\d+))?", text.strip())
    if found is None:
        raise DataError(f"{text!r} must be a step, or FIRST..LAST/STEP")
    first, last, width = int(found[1]), int(found[2] or found[1]), int(found[3] or found[1])
    return [(step, width) for step in range(first, last + 1, width)]


def _half_width(word: str, rows: Sequence[Mapping[int, float]], family: Sequence[Mapping[int, float]]) -> float:
    d = np.array([rows[0][seed] - rows[1][seed] for seed in sorted(set(rows[0]) & set(rows[1]))])
    if word == "±":
        return own_half_width(d)
    seeds = sorted({seed for row in [*rows, *family] for seed in row})
    aligned = {str(i): [row.get(seed, np.nan) for seed in seeds] for i, row in enumerate([*rows, *family])}
    return common_spread(aligned).half_width(d)


Step = tuple[int, int] | None
OfRun = Callable[[RunSummary], float]


def _loss(_: Step) -> OfRun:
    return lambda run: float(run.validation["validation_loss"])


def _train(step: Step) -> OfRun:
    def mean(run: RunSummary) -> float:
        end, width = step or (run.last_trained["iteration"], run.last_trained["iteration"])
        return statistics.mean(r["lm_loss"] for r in run.trained if end - width < r["iteration"] <= end)

    return mean


def _valid(step: Step) -> OfRun:
    end = step[0] if step else 0
    return lambda run: {r["iteration"]: r["validation_loss"] for r in run.records if "validation_loss" in r}[end]


def _last(key: str) -> Callable[[Step], OfRun]:
    return lambda step: lambda run: [r[key] for r in run.trained if step is None or r["iteration"] <= step[0]][-1]


def _settled(key: str, worst: Callable[[Sequence[float]], float]) -> Callable[[Step], OfRun]:
    return lambda _: lambda run: worst([r[key] for r in run.trained if key in r and r["iteration"] > SETTLED])


def _millions(part: str) -> Callable[[Step], OfRun]:
    return lambda _: lambda run: getattr(run.parameters, part) / 1e6


_QUANTITIES: Mapping[str, Callable[[Step], OfRun]] = {
    "": _loss,
    "±": _loss,
    "pooled": _loss,
    "train": _train,
    "valid": _valid,
    "total": _millions("total"),
    "experts": _millions("expert"),
    "active": _millions("active"),
    "entropy": _last("least_load_entropy"),
    "lowest entropy": _settled("least_load_entropy", min),
    "largest share": _settled("largest_expert_share", max),
    "idle": _settled("idle_experts", lambda counts: statistics.mean(count > 0 for count in counts)),
    "most idle": _settled("idle_experts", max),
}
_WORST: dict[str, Callable[[Sequence[float]], float]] = {"lowest entropy": min}
_WORST |= dict.fromkeys(("largest share", "idle", "most idle"), max)
