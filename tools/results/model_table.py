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
from tools.results.verdicts import FEW, HeldOut, Losses, short, table_of

#: Titles of tables by --optimizer.
OPTIMIZERS = {"muon": "Muon", "adam": "AdamW"}
#: How the table of losses begins.
LOSSES = "| model | expert parameters | seeds | steps | test loss | from the MoE of 8 |"
#: Models that `second_late.py` trained for as many steps as the MoE of 8, and how many times its experts they have.
_LATE = {"late/moe-of-16": 2, "late/4-banks-of-16": 1, "late/pruned-to-8": 1}


def shown_losses(held_out: HeldOut) -> Losses:
    """Returns the losses that may be looked at of models that are as deep as the MoE of 8, those of the late cure among them."""
    known = {**held_out.opened, **held_out.derived}
    return {name: known[name] for name in held_out.judged if name in held_out.opened or name in _LATE}


def losses_table(models: Models, held_out: HeldOut) -> str:
    """Returns the table of Markdown of the models whose claims can be judged: by parameters of experts, then by loss."""
    losses = shown_losses(held_out)
    rows = list[list[str]]()
    for name, row in losses.items():
        d = from_baseline(losses, name)
        difference = f"{d.mean():+.4f} ± {held_out.spread.half_width(d):.4f}" if len(d) else ""
        steps = _trained_as(models, name).config.training.train_iters
        cells = [str(len(row)), f"{steps:,}", f"{mean(row.values()):.4f}", difference]
        rows.append([short(name), expert_parameters(models, name), *cells])
    rows.sort(key=lambda row: (float(row[1].split()[0]), row[4]))
    return table_of(LOSSES, rows)


def expert_parameters(models: Models, name: str) -> str:
    """Returns the number of parameters in a model's experts, such as "1.06 M"."""
    return f"{_trained_as(models, name).parameters.expert * _LATE.get(name, 1) / 1e6:.2f} M"


def _trained_as(models: Models, name: str) -> RunSummary:
    return next(iter(models[FEW if name in _LATE else name].values()))


def rates_table(plans: Mapping[str, StudyPlan], models: Models, optimizer: str) -> str:
    """Returns the table of Markdown of what validation tells of the models that an optimizer trained: a row for each that has runs,
    once where several studies have it.

    Args:
        plans: of the registered studies, by name.
        optimizer: as --optimizer names it.
    """
    head = (
        f"| rates and routing under {OPTIMIZERS[optimizer]} | validation loss by rate (1e-3) | all seeds at the best rate "
        "| load entropy, largest share, idle experts |"
    )
    rows, shown = list[list[str]](), set[str]()
    for study, plan in plans.items():
        settled = list(filter(plan.is_settled, plan.all_runs()))
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
            by_rate = {rate: next(iter(runs.values())) for rate, runs in sorted(tried.items())}
            rows.append([variant.name, *_cells(models[name], by_rate)])
    return table_of(head, rows)


def _cells(runs: Mapping[int, RunSummary], tried: Mapping[float, RunSummary]) -> list[str]:
    """Returns losses by rate and by seed, and routing."""
    has_experts = next(iter(tried.values())).parameters.expert
    return [
        ", ".join(f"{1000 * rate:g}: {_loss(run)}" for rate, run in tried.items()),
        ", ".join(_loss(run) for _, run in sorted(runs.items())),
        "{:.2f}, {:.2f}, {:.0f}".format(*worst_routing(runs.values())) if runs and has_experts else "",
    ]


def _loss(run: RunSummary) -> str:
    return f"{run.validation['validation_loss']:.4f}"


def from_baseline(losses: Losses, name: str) -> np.ndarray:
    """Returns a model's differences from the MoE of 8, over the seeds that both have; none of it or of a model that may not be seen."""
    base, row = losses.get(FEW, {}), losses.get(name, {})
    return np.array([row[seed] - base[seed] for seed in sorted(base.keys() & row) if name != FEW])
