"""The picture of a compression: how far each model is from the original, over its bytes, over healing, and what layers lose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from megatron_samoe.compress.healing import OTHERS, STAGES
from megatron_samoe.compress.judge import Verdict
from megatron_samoe.evaluation.plots import colour, grid, png_of, side_by_side
from megatron_samoe.parsing import JsonObject

#: By the model that came out of training, the one that it began as.
_BEGINNINGS = {stage.name: "fitted" for stage in STAGES} | {stage.name: model for model, stage in OTHERS.items()}


def compression_plot(
    verdicts: Sequence[Verdict], lost: JsonObject, pairs: Sequence[Sequence[float]] | None,
    healing: Mapping[str, Sequence[JsonObject]], beside: Sequence[Sequence[Verdict]] = (),
) -> bytes:  # fmt: skip
    """Returns a picture as PNG.

    Args:
        verdicts: the original's first.
        lost: by MoE layer, what w1 and w2 lose.
        pairs: error_LL of pairs of layers; None where no map was chosen.
        healing: by model, the records of the runs that it healed in.
        beside: verdicts of other compressions of the same model.
    """
    panels = _Panels(4 + bool(healing) + (pairs is not None))
    others = verdicts[1:]
    for values, title in (([v.loss - verdicts[0].loss for v in others], "CE over the original (nats)"),
                          ([v.divergence for v in others], "KL from the original (nats)")):  # fmt: skip
        axes = next(panels)
        bars = axes.barh(np.arange(len(others)), values)
        for bar, verdict in zip(bars, others, strict=True):
            bar.set(color=_colour(verdict.model), alpha=1.0 if verdict.model in _BEGINNINGS else 0.5)
        axes.set_yticks(np.arange(len(others)), [v.model for v in others])
        axes.invert_yaxis()
        axes.set(title=title)
    _frontiers(next(panels), (verdicts, *beside))
    axes, layers = next(panels), sorted(lost, key=int)
    for row, name in enumerate(("w1", "w2")):
        axes.plot([int(n) for n in layers], [lost[n][row] for n in layers], "o-", label=name, color=colour(row))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title="lost of a layer's products (norm / norm)", xlabel="MoE layer", ylim=(0, None))
    axes.legend()
    if healing:
        axes = next(panels)
        for name, records in healing.items():
            iterations, losses = [r["iteration"] for r in records], [r["lm_loss"] for r in records]
            axes.plot(iterations, losses, _line(name), color=_colour(name), label=name)
        axes.set(title="training CE while healing (nats)", xlabel="step of the run")
        axes.legend()
    if pairs is not None:
        axes = next(panels)
        panels.figure.colorbar(grid(axes, np.array(pairs), cmap="viridis"), ax=axes)
        axes.set(title="share of products that a pair loses", xlabel="MoE layer", ylabel="MoE layer")
    return png_of(panels.figure)


def _frontiers(axes: Axes, compressions: Sequence[Sequence[Verdict]]) -> None:
    """Draws each model's cross-entropy over the original's against its share of the original's expert bytes."""
    for name in dict.fromkeys(v.model for whole in compressions for v in whole[1:]):
        points = sorted(
            (v.expert_bytes / whole[0].expert_bytes, v.loss - whole[0].loss)
            for whole in compressions
            for v in whole
            if v.model == name
        )
        axes.plot(*zip(*points, strict=True), _line(name), marker="o", color=_colour(name), label=name)
    axes.set(title="CE over the original (nats)", xlabel="share of its expert bytes", xlim=(0, 1.05))
    axes.legend(fontsize="small", ncols=2)


def _colour(model: str) -> Any:
    """Returns one colour for a model and what it becomes by training."""
    families = ("fitted", "blind", "pruned", "merged")
    family = _BEGINNINGS.get(model, model)
    return colour(families.index(family)) if family in families else "grey"


def _line(model: str) -> str:
    """Returns the style of a model's line: dotted before it heals, dashed between two stages."""
    return ":" if model not in _BEGINNINGS else "--" if model == STAGES[0].name else "-"


class _Panels(Iterator[Axes]):
    """Panels of a figure, one after the other, each with a grid."""

    def __init__(self, count: int):
        self.figure, axes = side_by_side(count, width=6.0)
        self._axes = iter(axes)

    def __next__(self) -> Axes:
        axes = next(self._axes)
        axes.grid(alpha=0.3)
        return axes
