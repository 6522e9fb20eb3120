"""The tables of the second edition's models, made from the runs of a store.

Losses on the test split, and differences, are shown of models whose claim can be judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean

import numpy as np

from megatron_samoe.evaluation.run_summary import RunSummary
from megatron_samoe.evaluation.study.plan import StudyPlan
from tools.results.page_figures import Models, worst_routing
from tools.results.verdicts import FEW, HeldOut, Losses, table_of

#: Titles of tables by --optimizer.
OPTIMIZERS = {"muon": "Muon", "adam": "AdamW"}


def model_table(plans: Mapping[str, StudyPlan], models: Models, held_out: HeldOut, optimizer: str) -> str:
    """Returns the table of Markdown of the models that an optimizer trained: a row for each that has runs, once where several studies
    have it.

    Args:
        plans: of the registered studies, by name.
        optimizer: as --optimizer names it.
    """
    head = (
        f"| under {OPTIMIZERS[optimizer]} | expert parameters | validation loss by rate (1e-3) | all seeds at the best rate | test loss "
        "| from the MoE of 8 | load entropy, largest share, idle experts |"
    )
    spread, opened, rows, shown = held_out.spread, held_out.opened, list[list[str]](), set[str]()
    for study, plan in plans.items():
        given_up, settled = {name for name, _ in plan.given_up()}, list(filter(plan.is_settled, plan.all_runs()))
        for variant in plan.study.variants:
            name, own = f"{study}/{variant.name}", [run for run in settled if run.variant == variant]
            keys = {plan.key_of(run) for run in own}
            tried = {float(n.removeprefix(f"{name}@")): r for n, r in models.items() if n.startswith(f"{name}@") and r}
            if not (tried or models[name]) or keys <= shown:
                continue
            options = plan.config_of(own[0]).optimizer
            if options.optimizer != optimizer:
                continue
            tried = tried or {options.lr: models[name]}
            shown |= keys
            cells = _cells(models[name], {rate: next(iter(runs.values())) for rate, runs in sorted(tried.items())})
            losses = opened.get(name, {})
            cells.insert(3, f"{mean(losses.values()):.4f}" if losses else "")
            d = from_baseline(opened, name)
            cells.insert(4, f"{d.mean():+.4f} ± {spread.half_width(d):.4f}" if len(d) else "")
            rows.append([variant.name + ", given up after seed 1" * (variant.name in given_up), *cells])
    return table_of(head, rows)


def _cells(runs: Mapping[int, RunSummary], tried: Mapping[float, RunSummary]) -> list[str]:
    """Returns what validation tells: parameters, losses by rate and by seed, routing."""
    experts = next(iter(tried.values())).parameters.expert
    return [
        f"{experts / 1e6:.2f} M" if experts else "",
        ", ".join(f"{1000 * rate:g}: {_loss(run)}" for rate, run in tried.items()),
        ", ".join(_loss(run) for _, run in sorted(runs.items())),
        "{:.2f}, {:.2f}, {:.0f}".format(*worst_routing(runs.values())) if runs and experts else "",
    ]


def _loss(run: RunSummary) -> str:
    return f"{run.validation['validation_loss']:.4f}"


def from_baseline(losses: Losses, name: str) -> np.ndarray:
    """Returns a model's differences from the MoE of 8, over the seeds that both have; none of it or of a model that may not be seen."""
    base, row = losses.get(FEW, {}), losses.get(name, {})
    return np.array([row[seed] - base[seed] for seed in sorted(base.keys() & row) if name != FEW])
