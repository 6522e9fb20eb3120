"""The page of a compression: how far each model is from the original, over its bytes and over healing, and what layers lose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_samoe.evaluation.page import Section, write_page
from megatron_samoe.evaluation.plots import colour, finished, grid, png_of, side_by_side
from megatron_samoe.fit.compress.healing import OTHERS, STAGES
from megatron_samoe.fit.compress.judge import Verdict, verdict_table
from megatron_samoe.parsing import JsonObject

#: By the model that came out of training, the one that it began as.
_BEGINNINGS = {stage.name: "fitted" for stage in STAGES} | {stage.name: model for model, stage in OTHERS.items()}
_LONGER = OTHERS["original"].name
#: What models are, by name.
_WORDS = {
    "matched": "the original with experts, their neurons and routers' rows renumbered, so that what is alike in several layers has one "
    "number. It computes what the original computes: a check.",
    "fitted": "the compressed model before it is trained. Layers share experts, which were fitted to what the old ones compute on the text "
    "of calibration.",
    "blind": "layers share as the compressed model's do, but by the old weights alone, without any text.",
    "pruned": "layers share nothing. Each keeps the experts that add most to its output on the text of calibration, as many as fit "
    "into the compressed model's bytes.",
    "merged": "layers share nothing. Each layer's experts are merged into as many means of similar ones, and bytes are counted so. It is "
    "not healed, since the experts of one mean would come apart.",
    STAGES[0].name: "the compressed model after the first stage of training: of what layers share, alone.",
    STAGES[1].name: "the compressed model after the second: of what layers share, coefficients and routers.",
    STAGES[2].name: "the compressed model after the third: of all weights.",
    OTHERS["blind"].name: "blind, after as many steps from the same teacher.",
    OTHERS["pruned"].name: "pruned, after as many steps from the same teacher; experts and routers are trained, or all "
    "weights if the compressed model's are.",
    _LONGER: "the original, trained on by as many steps: at the same rate, with all its weights, from text alone. A healed model that is "
    "below the original, but not below this one, owes it to the steps.",
}
#: Below this an axis of losses is linear, above it logarithmic: one large loss leaves room for the others.
_LINEAR_BELOW = 0.01


@dataclass(frozen=True)
class Compressed:
    """The content of a compression's page.

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
    """Writes the page, and each plot as a PNG next to it."""
    layers = (
        "Root of the share of the power of a layer's matrix products that the fit loses, on the text of calibration; w2 after w1, with "
        "the inputs that the fitted w1 gives it."
    )
    training = "Training loss, without the divergence. The axis ends where the runs are after a quarter of their steps."
    sections = [
        *_verdict_sections(compressed),
        Section("bytes", "Loss against bytes", png=_frontiers((compressed.verdicts, *compressed.beside))),
        Section("healing", "Healing", [training], png=_healing(compressed.healing)),
        Section("layers", "What layers lose", [layers], png=_layers(compressed.lost)),
    ]
    if compressed.pairs is not None:
        how = "Share of their products' power that two layers lose by sharing one set; the map was chosen by it."
        sections.append(Section("pairs", "What pairs of layers lose", [how], png=_pairs(compressed.pairs)))
    write_page(path, "A MoE, compressed", sections)


def _verdict_sections(compressed: Compressed) -> list[Section]:
    """Returns a section of the models that were trained, which are compared with each other, and one of the others."""
    how = (
        "CE: cross-entropy in nats a token, on text that nothing here was fitted or trained on. KL: divergence of the model's predictions "
        f"from the original's there. Axes are logarithmic beyond {_LINEAR_BELOW}."
    )
    original, *others = compressed.verdicts
    trained = [v for v in others if v.model in _BEGINNINGS]
    made = [v for v in others if v.model not in _BEGINNINGS]
    first = Section("verdicts", "At a glance", sentence=_sentence(original, others))
    groups = [(first, trained or made)]
    if trained:
        groups.append((Section("made", "Before any training", sentence=_fitted_sentence(original, made)), made))
    for section, group in groups:
        section.paragraphs = [f"{v.model}: {_WORDS[v.model]}" for v in group]
        section.table, section.png = verdict_table([original, *group]), _points(original, group)
    first.paragraphs.append(how)
    return [section for section, _ in groups]


def _sentence(original: Verdict, others: Sequence[Verdict]) -> str:
    """Returns what the compressed model's bytes cost, against the original, and against more training of it."""
    last = [v for v in others if _family(v.model) == "fitted"][-1]
    longer = [v for v in others if v.model == _LONGER]
    against = f", {last.loss - longer[0].loss:+.4f} over the original trained on by as many steps" if longer else ""
    return (
        f"{last.expert_bytes / original.expert_bytes:.0%} of the expert bytes, {'healed' if last.model in _BEGINNINGS else 'not healed'}: "
        f"cross-entropy {last.loss - original.loss:+.4f} nats over the original{against}; KL {last.divergence:.4f} from the original."
    )


def _fitted_sentence(original: Verdict, made: Sequence[Verdict]) -> str:
    fitted = next(v for v in made if v.model == "fitted")
    return f"The fit alone: cross-entropy {fitted.loss - original.loss:+.4f} nats over the original, KL {fitted.divergence:.4f}."


def _points(original: Verdict, others: Sequence[Verdict]) -> bytes:
    """Draws each model's cross-entropy over the original's, and its divergence, as points on an axis that holds small and large."""
    figure, (axes,) = side_by_side(1, width=6.0)
    axes.axvline(0.0, color="grey", linewidth=1)
    for row, verdict in enumerate(others):
        for place, value, fill, line in (
            (row - 0.18, verdict.loss - original.loss, "full", "-"),
            (row + 0.18, verdict.divergence, "none", ":"),
        ):
            axes.plot([0.0, value], [place, place], line, color=_colour(verdict.model))
            axes.plot(value, place, "o", color=_colour(verdict.model), fillstyle=fill)
            axes.annotate(
                f"{round(value, 3) + 0.0:.3f}",
                (max(value, 0.0), place),
                (7, -3),
                textcoords="offset points",
                fontsize=8,
            )
    for label, fill in (("CE over the original", "full"), ("KL from the original", "none")):
        axes.plot([], [], "o", color="grey", fillstyle=fill, label=label)
    axes.set_yticks(range(len(others)), [v.model for v in others])
    axes.set_ylim(len(others) - 0.4, -0.6)
    _hold_small_and_large(axes.set_xscale, axes.xaxis)
    axes.margins(x=0.12)
    axes.set(xlabel="nats a token")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2)
    return png_of(figure)


def _hold_small_and_large(set_scale: Callable[..., object], axis: Any) -> None:
    set_scale("symlog", linthresh=_LINEAR_BELOW)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _frontiers(compressions: Sequence[Sequence[Verdict]]) -> bytes | None:
    """Draws each model's cross-entropy over the original's against its share of the original's expert bytes."""
    figure, (axes,) = side_by_side(1, width=8.0)
    for name in dict.fromkeys(v.model for whole in compressions for v in whole[1:] if v.model != "matched"):
        points = sorted(
            (v.expert_bytes / whole[0].expert_bytes, v.loss - whole[0].loss)
            for whole in compressions
            for v in whole
            if v.model == name
        )
        axes.plot(*zip(*points, strict=True), _line(name), marker="o", color=_colour(name), label=name)
    _hold_small_and_large(axes.set_yscale, axes.yaxis)
    axes.axhline(0.0, color="grey", linewidth=1)
    axes.set(ylabel="CE over the original (nats)", xlabel="share of its expert bytes", xlim=(0, 1.05))
    return finished(figure, axes, True)


def _healing(healing: Mapping[str, Sequence[JsonObject]]) -> bytes | None:
    if not healing:
        return None
    figure, (axes,) = side_by_side(1, width=8.0)
    for name, records in healing.items():
        iterations, losses = [r["iteration"] for r in records], [r["lm_loss"] for r in records]
        axes.plot(iterations, losses, _line(name), color=_colour(name), label=name)
    # What was not fitted begins far off, and comes down within some steps.
    settled = [r["lm_loss"] for records in healing.values() for r in records[len(records) // 4 :]]
    low, high = min(settled), max(settled)
    axes.set(
        ylabel="training CE (nats)",
        xlabel="step of the run",
        ylim=(low - 0.1 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3),
    )
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
    """Returns the style of a model's line: dotted before it heals, dashed or dash-dotted after the first two stages."""
    return ":" if model not in _BEGINNINGS else {STAGES[0].name: "--", STAGES[1].name: "-."}.get(model, "-")
