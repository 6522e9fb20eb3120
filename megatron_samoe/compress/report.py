"""The page of a compression: how far each model is from the original, over its bytes and over healing, and what layers lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from megatron_samoe.compress.healing import OTHERS, STAGES
from megatron_samoe.compress.judge import Verdict, verdict_table
from megatron_samoe.evaluation.page import Section, write_page
from megatron_samoe.evaluation.plots import colour, finished, grid, png_of, side_by_side
from megatron_samoe.parsing import JsonObject

#: By the model that came out of training, the one that it began as.
_BEGINNINGS = {stage.name: "fitted" for stage in STAGES} | {stage.name: model for model, stage in OTHERS.items()}


@dataclass(frozen=True)
class Compressed:
    """What the page of a compression is made of.

    Attributes:
        verdicts: the original's first.
        lost: by MoE layer, what w1 and w2 lose.
        pairs: error_LL of pairs of layers; None where no map was chosen.
        healing: by model, the records of the run that it healed in.
        beside: verdicts of other compressions of the same model.
    """

    verdicts: Sequence[Verdict]
    lost: JsonObject
    pairs: Sequence[Sequence[float]] | None
    healing: Mapping[str, Sequence[JsonObject]]
    beside: Sequence[Sequence[Verdict]] = ()


def write_compression_report(path: Path, compressed: Compressed) -> None:
    """Writes the page, and each plot as a PNG beside it."""
    how = (
        "CE: cross-entropy on held-out text in nats a token. KL: divergence of the model's predictions from the original's there. "
        "Pale bars and dotted lines: models that were not trained after they were made."
    )
    layers = (
        "Root of the share of the power of a layer's matrix products that the fit loses, on the text of calibration; w2 after w1, with "
        "the inputs that the fitted w1 gives it."
    )
    sections = [
        Section("verdicts", "At a glance", [how], verdict_table(compressed.verdicts), _bars(compressed.verdicts), _sentence(compressed)),
        Section("bytes", "Loss against bytes", png=_frontiers((compressed.verdicts, *compressed.beside))),
        Section("healing", "Healing", ["Training loss, without the divergence."], png=_healing(compressed.healing)),
        Section("layers", "What layers lose", [layers], png=_layers(compressed.lost)),
    ]  # fmt: skip
    if compressed.pairs is not None:
        how = "Share of their products' power that two layers lose by sharing one set; the map was chosen by it."
        sections.append(Section("pairs", "What pairs of layers lose", [how], png=_pairs(compressed.pairs)))
    write_page(path, "A MoE, compressed", sections)


def _sentence(compressed: Compressed) -> str:
    """Returns what the compressed model's bytes cost."""
    original, made = compressed.verdicts[0], [v for v in compressed.verdicts if _family(v.model) == "fitted"]
    last = made[-1]
    words = "after healing" if last.model in _BEGINNINGS else "not healed"
    return (
        f"{last.expert_bytes / original.expert_bytes:.0%} of the expert bytes; cross-entropy {last.loss - original.loss:+.4f} nats, "
        f"KL {last.divergence:.4f} from the original, {words}."
    )


def _bars(verdicts: Sequence[Verdict]) -> bytes:
    others = verdicts[1:]
    figure, panels = side_by_side(2, width=5.0)
    for axes, values, title in zip(
        panels, ([v.loss - verdicts[0].loss for v in others], [v.divergence for v in others]),
        ("CE over the original (nats)", "KL from the original (nats)"), strict=True,
    ):  # fmt: skip
        bars = axes.barh(np.arange(len(others)), values)
        for bar, verdict in zip(bars, others, strict=True):
            bar.set(color=_colour(verdict.model), alpha=1.0 if verdict.model in _BEGINNINGS else 0.5)
        axes.set_yticks(np.arange(len(others)), [v.model for v in others])
        axes.invert_yaxis()
        axes.set(title=title)
        axes.grid(alpha=0.3)
    return png_of(figure)


def _frontiers(compressions: Sequence[Sequence[Verdict]]) -> bytes | None:
    """Draws each model's cross-entropy over the original's against its share of the original's expert bytes."""
    figure, (axes,) = side_by_side(1, width=8.0)
    for name in dict.fromkeys(v.model for whole in compressions for v in whole[1:]):
        points = sorted(
            (v.expert_bytes / whole[0].expert_bytes, v.loss - whole[0].loss)
            for whole in compressions
            for v in whole
            if v.model == name
        )
        axes.plot(*zip(*points, strict=True), _line(name), marker="o", color=_colour(name), label=name)
    axes.set(ylabel="CE over the original (nats)", xlabel="share of its expert bytes", xlim=(0, 1.05))
    return finished(figure, axes, True)


def _healing(healing: Mapping[str, Sequence[JsonObject]]) -> bytes | None:
    if not healing:
        return None
    figure, (axes,) = side_by_side(1, width=8.0)
    for name, records in healing.items():
        iterations, losses = [r["iteration"] for r in records], [r["lm_loss"] for r in records]
        axes.plot(iterations, losses, _line(name), color=_colour(name), label=name)
    axes.set(ylabel="training CE (nats)", xlabel="step of the run")
    return finished(figure, axes, True)


def _layers(lost: JsonObject) -> bytes | None:
    figure, (axes,) = side_by_side(1, width=6.0)
    numbers = sorted(lost, key=int)
    for row, name in enumerate(("w1", "w2")):
        axes.plot([int(n) for n in numbers], [lost[n][row] for n in numbers], "o-", label=name, color=colour(row))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(ylabel="lost (norm / norm)", xlabel="MoE layer", ylim=(0, None))
    return finished(figure, axes, True)


def _pairs(error_LL: Sequence[Sequence[float]]) -> bytes:
    figure, (axes,) = side_by_side(1, width=6.0)
    figure.colorbar(grid(axes, np.array(error_LL), cmap="viridis"), ax=axes)
    axes.set(xlabel="MoE layer", ylabel="MoE layer")
    return png_of(figure)


def _family(model: str) -> str:
    """Returns what a model was before it was trained."""
    return _BEGINNINGS.get(model, model)


def _colour(model: str) -> Any:
    """Returns one colour for a model and what it becomes by training."""
    families = ("fitted", "blind", "pruned", "merged")
    return colour(families.index(_family(model))) if _family(model) in families else "grey"


def _line(model: str) -> str:
    """Returns the style of a model's line: dotted before it heals, dashed between two stages."""
    return ":" if model not in _BEGINNINGS else "--" if model == STAGES[0].name else "-"
