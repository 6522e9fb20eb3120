"""G7: whether a model whose layers share experts lies on the frontier of loss, time of a decoding step and resident bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean

from megatron_samoe.evaluation.run_summary import RunSummary
from megatron_samoe.evaluation.study.definition import folder_name
from tools.results.measured import rows_of
from tools.results.page_figures import Models
from tools.results.verdicts import HeldOut, short, table_of

#: How the table begins.
HEAD = "| decoding, fp32, one thread | test loss | MB | ms a step, batch 1 | batch 8 | dominated by |"
#: Times that differ by less are equal: rounds scatter so.
SLACK = 1.03


@dataclass(frozen=True)
class Point:
    """A model in a way of serving: nats per token, resident bytes of weights, milliseconds of a step by batch."""

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
    """Returns the table of all models that may be shown and were timed; nothing before one of them shares experts."""
    points = list(_points(models, held_out))
    owned = [point for point in points if not point.shares]
    rows = []
    for p in points:
        best = min((o for o in owned if o.dominates(p)), key=lambda o: o.loss, default=None)
        told = ("" if best is None else best.name) if p.shares else "owns its experts"
        rows.append([p.name, f"{p.loss:.4f}", f"{p.num_bytes / 1e6:.1f}", *(f"{t:.3f}" for t in p.times), told])
    return table_of(HEAD, rows) if len(owned) < len(points) else ""


def _points(models: Models, held_out: HeldOut) -> Iterable[Point]:
    timed = {(row["contestant"], row["batch"]): row["ms_per_token"] for row in rows_of("decode/study")}
    for model, losses in held_out.opened.items():
        run, name = next(iter(models[model].values())), short(model)
        combines = run.config.moe.has_pool
        for serving in ("folded", "on-the-fly") if combines else ("folded",):
            keys = [(f"{folder_name(name)} {serving}", batch) for batch in (1, 8)]
            if timed.keys() >= set(keys):
                label, shares = f"{name}, {serving}" if combines else name, run.config.moe.shares_experts
                yield Point(
                    label,
                    shares,
                    mean(losses.values()),
                    4.0 * _resident(run, serving),
                    tuple(timed[key] for key in keys),
                )


def _resident(run: RunSummary, serving: str) -> float:
    """Returns the parameters that are held: of a folded pool each layer's own experts."""
    count, config = run.parameters, run.config
    if serving != "folded" or not config.moe.has_pool:
        return count.total
    return count.total + count.expert * (config.model.num_layers / config.moe.num_expert_banks - 1)
