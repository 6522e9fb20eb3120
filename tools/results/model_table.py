"""The table and the plot of the second edition's models, made from the runs of a store.

Losses on the test split, and differences, are shown of models whose study is whole.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from statistics import mean

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from megatron_samoe.evaluation import plots_study
from megatron_samoe.evaluation.run_summary import RunSummary
from megatron_samoe.evaluation.study.plan import StudyPlan
from megatron_samoe.evaluation.study.statistics import Difference, differences
from megatron_samoe.parsing import JsonObject
from tools.results.page_figures import Models, worst_routing
from tools.results.verdicts import by_seed, losses_on_test, short

#: How the table begins.
HEAD = (
    "| model | expert parameters | validation loss by rate (1e-3) | all seeds at the best rate | test loss | from the MoE of 8 "
    "| load entropy, largest share, idle |"
)
BASELINE = "second_regime/moe of 8"


def model_table(plans: Mapping[str, StudyPlan], models: Models, sealed: Collection[str]) -> str:
    """Returns the table of Markdown: a row for each model that has runs, once where several studies have it.

    Args:
        plans: of the registered studies, by name.
    """
    found = _from_baseline(by_seed(losses_on_test(models, sealed)))
    lines, shown = [HEAD, "|---" * (HEAD.count("|") - 1) + "|"], set[str]()
    for study, plan in plans.items():
        given_up, settled = {name for name, _ in plan.given_up()}, list(filter(plan.is_settled, plan.all_runs()))
        for variant in plan.study.variants:
            name = f"{study}/{variant.name}"
            keys = {plan.key_of(run) for run in settled if run.variant == variant}
            tried = {float(n.removeprefix(f"{name}@")): r for n, r in models.items() if n.startswith(f"{name}@") and r}
            if not tried or keys <= shown:
                continue
            shown |= keys
            cells = [variant.name + ", given up" * (variant.name in given_up)]
            cells += _cells(models[name], {rate: next(iter(runs.values())) for rate, runs in sorted(tried.items())})
            test = [run.validation["test_loss"] for run in models[name].values() if name not in sealed]
            cells.insert(4, f"{mean(test):.4f}" if test else "")
            d = found.get(name)
            cells.insert(5, f"{d.mean:+.4f} ± {d.pooled_half_width:.4f}" if d else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(runs: Mapping[int, RunSummary], tried: Mapping[float, RunSummary]) -> list[str]:
    """Returns what validation tells: parameters, losses by rate and by seed, routing."""
    experts = next(iter(tried.values())).parameters.expert
    return [
        f"{experts / 1e6:.2f} M" if experts else "",
        ", ".join(f"{1000 * rate:g}: {_loss(run)}" for rate, run in tried.items()),
        ", ".join(_loss(run) for _, run in sorted(runs.items())),
        ", ".join(f"{value:.2f}" for value in worst_routing(runs.values())) if runs and experts else "",
    ]


def _loss(run: RunSummary) -> str:
    return f"{run.validation['validation_loss']:.4f}"


def _from_baseline(losses: Mapping[str, list[float]]) -> Mapping[str, Difference]:
    return differences(losses, BASELINE, 0.0) if BASELINE in losses else {}


def compared(models: Models, sealed: Collection[str]) -> JsonObject:
    """Returns losses on the test split of the claims' models, and their differences from the MoE of 8, as a study's results have them."""
    losses = by_seed(losses_on_test(models, sealed))
    found = _from_baseline(losses)
    variants = [
        {"name": short(name), "losses": row, "difference": asdict(found[name]) if name in found else None}
        for name, row in losses.items()
    ]
    return {
        "baseline": short(BASELINE),
        "loss": "test loss",
        "margin": 0.0,
        "variants": json.loads(json.dumps(variants), parse_float=lambda text: round(float(text), 5)),
    }


def write_plot(path: Path, study: JsonObject) -> None:
    """Draws the differences, with what is drawn as text inside the PNG."""
    png = plots_study.differences(study)
    assert png is not None
    told = PngInfo()
    told.add_text("Description", json.dumps(study))
    Image.open(BytesIO(png)).save(path, pnginfo=told)


def is_drawn(path: Path, study: JsonObject) -> bool:
    """Whether a plot shows these differences."""
    return path.is_file() and Image.open(path).info.get("Description") == json.dumps(study)
