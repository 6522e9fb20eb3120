"""G7: whether a model whose layers share experts lies on the frontier of loss, time of a decoding step and resident bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean

from megatron_samoe.evaluation.study.definition import folder_name
from tools.results.measured import rows_of
from tools.results.page_figures import Models
from tools.results.verdicts import HeldOut, short, table_of

#: How the table begins.
HEAD = "| decoding, fp32, one thread | test loss | MB | ms a step, batch 1 | batch 8 | dominated by |"
#: Times that differ by less are equal.
SLACK = 1.03
#: Ways to serve a pool; other models have one.
SERVINGS = ("folded", "on-the-fly")
#: Models made of others: the shape that was timed, and whether its layers share experts. Those of own experts that are worse than one
#: of their shape from scratch have no row.
MADE = {
    "half/healed-routers": ("4 banks of 32, longer", True),
    "quarter/healed-routers": ("2 banks of 32, longer", True),
    "late/moe-of-16": ("moe of 16", False),
}


@dataclass(frozen=True)
class Point:
    """A model in a way of serving: nats per token, resident bytes of weights, milliseconds of a step by batch.

    Attributes:
        shares: whether its layers share experts.
    """

    name: str
    shares: bool
    loss: float
    num_bytes: float
    times: tuple[float, ...]

    def dominates(self, other: Point) -> bool:
        """Whether it is as good as another in everything, and better in something."""
        times = list(zip(self.times, other.times, strict=True))
        is_as_good = self.loss <= other.loss and self.num_bytes <= other.num_bytes
        is_better = self.loss < other.loss or self.num_bytes < other.num_bytes
        return (
            is_as_good and all(a <= b * SLACK for a, b in times) and (is_better or any(a * SLACK < b for a, b in times))
        )


def frontier(models: Models, held_out: HeldOut) -> str:
    """Returns the table of the models that may be shown and were timed; nothing before one of them shares experts.

    The last column names what dominates a model that shares, and says `own` of others.
    """
    points = list(_points(models, held_out))
    owned = [point for point in points if not point.shares]
    rows = []
    for p in points:
        best = min((o for o in owned if o.dominates(p)), key=lambda o: o.loss, default=None)
        told = ("" if best is None else best.name) if p.shares else "own"
        rows.append([p.name, f"{p.loss:.4f}", f"{p.num_bytes / 1e6:.1f}", *(f"{t:.3f}" for t in p.times), told])
    return table_of(HEAD, rows) if len(owned) < len(points) else ""


def _points(models: Models, held_out: HeldOut) -> Iterable[Point]:
    timed = {(row["contestant"], row["batch"]): row for row in rows_of("decode/study")}
    for model in (name for name in held_out.judged if name in held_out.trained or name in MADE):
        if model in held_out.trained:
            runs = models[model].values()
            losses, shape, shares = held_out.trained[model], short(model), next(iter(runs)).config.moe.shares_experts
        else:
            losses, (shape, shares) = held_out.derived[model], MADE[model]
        keys = {way: [(f"{folder_name(shape)} {way}", batch) for batch in (1, 8)] for way in SERVINGS}
        ways = [way for way in SERVINGS if timed.keys() >= set(keys[way])]
        for way in ways:
            rows = [timed[key] for key in keys[way]]
            label = f"{short(model)}, {way}" if len(ways) > 1 else short(model)
            times = tuple(min(row["samples_ms"]) for row in rows)  # other programs only add to a round's time
            yield Point(label, shares, mean(losses.values()), 1e6 * rows[0]["weights_mb"], times)
