"""The plots of the second edition's models, made from the runs of a store. What one shows is kept as text inside the PNG."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import mean

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from megatron_samoe.evaluation import plots_study
from megatron_samoe.evaluation.plots import OUTSIDE, colour, marker, plt, png_of
from megatron_samoe.evaluation.run_summary import RunSummary
from megatron_samoe.evaluation.study.plan import StudyPlan
from megatron_samoe.evaluation.study.statistics import own_half_width
from megatron_samoe.parsing import JsonObject
from tools.results.model_table import expert_parameters, from_baseline, shown_losses
from tools.results.page_figures import Models
from tools.results.verdicts import FEW, HeldOut, by_seed, short

#: Studies whose runs have the same steps and were tried at this rate, so that their courses can be compared: a run at a higher one is
#: behind until its rate falls.
_ONE_LENGTH, _ONE_RATE = ("second_regime", "second_sharing", "second_combination"), 3e-3


@dataclass(frozen=True)
class Plot:
    """What a plot shows, and what draws it."""

    shown: JsonObject
    draw: Callable[[JsonObject], bytes | None]

    def write(self, path: Path) -> None:
        """Writes the PNG with what it shows as text inside."""
        png, told = self.draw(self.shown), PngInfo()
        assert png is not None
        told.add_text("Description", json.dumps(self.shown))
        Image.open(BytesIO(png)).save(path, pnginfo=told)

    def is_in(self, path: Path) -> bool:
        """Whether a file shows this."""
        return path.is_file() and Image.open(path).info.get("Description") == json.dumps(self.shown)


def plots_of(plans: Mapping[str, StudyPlan], models: Models, held_out: HeldOut) -> dict[str, Plot]:
    """Returns the plots by their files' names."""
    names = [f"{study}/{variant.name}" for study in _ONE_LENGTH for variant in plans[study].study.variants]
    return {
        "differences.png": Plot(compared(models, held_out), plots_study.differences),
        "course.png": Plot(course(names, models), _drawn_course),
    }


def compared(models: Models, held_out: HeldOut) -> JsonObject:
    """Returns what `differences.png` shows of models of as many steps as the MoE of 8, as a study's results have it: losses on the
    test split, the lowest first, and differences from it."""
    steps = {run.config.training.train_iters for run in models[FEW].values()}
    losses = {
        name: row
        for name, row in shown_losses(held_out).items()
        if steps.issuperset(run.config.training.train_iters for run in models.get(name, {}).values())
    }
    losses = dict(sorted(losses.items(), key=lambda entry: mean(entry[1].values())))
    variants = []
    for name, row in by_seed(losses).items():
        d = from_baseline(losses, name)
        found = (
            {"mean": d.mean(), "half_width": own_half_width(d), "pooled_half_width": held_out.spread.half_width(d)}
            if len(d)
            else None
        )
        variants.append({"name": _with_experts(models, name), "losses": row, "difference": found})
    return {
        "baseline": _with_experts(models, FEW),
        "loss": "test loss",
        "margin": 0.0,
        "variants": json.loads(json.dumps(variants), parse_float=lambda text: round(float(text), 5)),
    }


def _with_experts(models: Models, name: str) -> str:
    return f"{short(name)}, {expert_parameters(models, name)}"


def course(names: Sequence[str], models: Models) -> JsonObject:
    """Returns what `course.png` shows: validation losses minus those of the MoE of 8 by step, means over the seeds that both have, all at
    one rate: of a model whose best rate is another, seed 1.

    Args:
        names: of models, that of another study's MoE of 8 among them perhaps.
    """
    own = {seed: _validation(run) for seed, run in models[FEW].items()}
    found: dict[str, dict[int, float]] = {}
    for name in (name for name in names if short(name) != short(FEW)):
        at_rate = {seed: run for seed, run in models[name].items() if run.config.optimizer.lr == _ONE_RATE}
        runs = at_rate or models.get(f"{name}@{_ONE_RATE:g}", {})
        others = {seed: _validation(run) for seed, run in runs.items() if seed in own}
        for step in sorted({step for row in others.values() for step in row}):
            d = [row[step] - own[seed][step] for seed, row in others.items() if step in own[seed].keys() & row]
            found.setdefault(short(name), {})[step] = round(mean(d), 5)
    shown: JsonObject = json.loads(json.dumps(found))
    return shown


def _validation(run: RunSummary) -> dict[int, float]:
    return {r["iteration"]: r["validation_loss"] for r in run.records if "validation_loss" in r}


def _drawn_course(shown: JsonObject) -> bytes | None:
    figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
    for place, (name, row) in enumerate(shown.items()):
        axes.plot([int(step) for step in row], list(row.values()), f"{marker(place)}-", color=colour(place), label=name)
    axes.axhline(0, color="0.4", linewidth=1)
    axes.set(
        xlabel="steps, all at a rate of 3e-3 until 3,840, which then falls to 0",
        ylabel=f"validation loss minus that of {short(FEW)}, nats",
    )
    return png_of(figure, axes, **OUTSIDE)
