"""Fits the constants of the planner's model of time to published runs, and judges them by families that were held out.

`python -m tools.planner.fit` prints the constants for megatron_samoe/planning/gpus.py, and errors by family and GPU;
`--judge` only judges those that are there; `--plot FILE.png` draws planned against published speeds. Needs scipy.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from megatron_samoe.planning.accounting import train_flops_per_token
from megatron_samoe.planning.gpus import FITTED, GPUS, gpu_cluster
from megatron_samoe.planning.layout_cost import step_cost
from tools.planner.rows import Row, config_of, families, read_rows

#: What is fitted: a plausible value, to which a constant that runs say nothing about stays near, and its bounds.
CONSTANTS = {
    "efficiency": (0.7, 0.4, 0.8),
    "efficiency_8_hopper": (0.6, 0.3, 0.8),
    "efficiency_8_blackwell": (0.6, 0.3, 0.8),
    "efficiency_8_blackwell_ultra": (0.6, 0.3, 0.8),
    "mx": (0.95, 0.6, 1.0),
    "attention_efficiency": (0.5, 0.2, 0.8),
    "product_traffic": (1.0, 0.3, 3.0),
    "activation_traffic": (3.0, 1.0, 8.0),
    "moe_traffic": (1.5, 1.0, 6.0),
    "moe_traffic_fused": (1.0, 0.3, 3.0),
    "layer_launch_s": (5e-4, 0.0, 3e-3),
    "moe_launch_s": (3e-3, 0.0, 1e-2),
    "moe_launch_part_s": (3e-3, 0.0, 1e-2),
    "tensor_exposed": (0.4, 0.1, 1.0),
    "expert_exposed": (0.9, 0.1, 1.0),
    "expert_exposed_fused": (0.6, 0.1, 1.0),
}
#: Weight of a constant's distance from what is plausible, against a run's error, both in logarithms.
PRIOR = 0.1


def planned(row: Row, constants: Mapping[str, float] = FITTED) -> float:
    """Returns the tokens per second and GPU that the model of time gives for a published run."""
    config = config_of(row)
    recipe: dict[str, Any] = {"precision": row.precision, "graphs": row.graphs, "overlaps": True}
    recipe |= {"overlaps_experts": row.overlaps_experts, "sends_once": row.dispatcher == "flex"}
    recipe |= {"expert_row_bytes": row.expert_row_bytes}
    cluster = gpu_cluster(row.gpu, row.gpus, **recipe, constants=constants)
    assert config.data.vocab_size is not None
    return row.gbs * row.seq / step_cost(config, config.data.vocab_size, cluster).step_s / row.gpus


def one_mfu(rows: Sequence[Row], fitted_on: Sequence[Row]) -> list[float]:
    """Returns what one share of the peak in the row's precision, the best for other rows, would give."""
    at_peak = {row: _at_peak(row) for row in {*rows, *fitted_on}}
    share = median(row.tokens_per_s / at_peak[row] for row in fitted_on)
    return [share * at_peak[row] for row in rows]


def _at_peak(row: Row) -> float:
    config, gpu = config_of(row), GPUS[row.gpu]
    assert config.data.vocab_size is not None
    peak = gpu.flops if row.precision == "bf16" else gpu.flops_8
    return peak / train_flops_per_token(config, config.data.vocab_size)


def sides() -> tuple[list[Row], list[Row]]:
    """Returns the modelled rows to fit, and those to judge by."""
    rows = [row for row in read_rows() if row.not_modelled is None]
    return [r for r in rows if r.family in families()["fit"]], [r for r in rows if r.family in families()["held_out"]]


def fit(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the constants with which the model of time is nearest to rows: least squares of logarithms, large errors counting
    linearly."""
    from scipy.optimize import least_squares

    start, low, high = np.array(list(CONSTANTS.values())).T

    def distances(values: Any) -> Any:
        constants = dict(zip(CONSTANTS, values, strict=True))
        errors = [math.log(planned(row, constants) / row.tokens_per_s) for row in rows]
        return np.array([*errors, *(PRIOR * np.log((values + 1e-6) / (start + 1e-6)))])

    found = least_squares(distances, start, bounds=(low, high), x_scale=start, loss="soft_l1", f_scale=0.1, max_nfev=40)
    return dict(zip(CONSTANTS, map(float, found.x), strict=True))


def errors(ratios: Sequence[float]) -> tuple[float, float]:
    """Returns the median and the 90th percentile of |planned / published - 1|."""
    wrong = np.abs(np.array(ratios) - 1)
    return float(np.median(wrong)), float(np.quantile(wrong, 0.9))


def table(rows: Sequence[Row], values: Sequence[float]) -> list[str]:
    """Returns the lines of a table of errors in percent, families by GPUs: median / nine of ten within (runs)."""
    gpus = [gpu for gpu in GPUS if any(row.gpu == gpu for row in rows)]

    def cell(family: str, gpu: str) -> str:
        chosen = [i for i, r in enumerate(rows) if family in ("all", r.family) and gpu in ("all", r.gpu)]
        if not chosen:
            return ""
        middle, most = errors([values[i] / rows[i].tokens_per_s for i in chosen])
        return f"{100 * middle:.0f} / {100 * most:.0f} ({len(chosen)})"

    lines = [f"| family | {' | '.join(gpus)} | all |", "|---" * (len(gpus) + 2) + "|"]
    for family in [*sorted({str(row.family) for row in rows}), "all"]:
        lines.append(f"| {family} | {' | '.join(cell(family, gpu) for gpu in (*gpus, 'all'))} |")
    return lines


def draw(path: Path, groups: Mapping[str, tuple[Sequence[Row], Sequence[float]]]) -> None:
    """Draws planned over published speeds, a panel for each side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(groups), figsize=(5.2 * len(groups), 4.6), layout="constrained", squeeze=False)
    for axes, (name, (rows, values)) in zip(panels[0], groups.items(), strict=True):
        for family in sorted({str(row.family) for row in rows}):
            chosen = [(r.tokens_per_s, v) for r, v in zip(rows, values, strict=True) if r.family == family]
            axes.scatter(*zip(*chosen, strict=True), s=16, label=family, alpha=0.8)
        ends = np.array([min(r.tokens_per_s for r in rows) * 0.8, max(r.tokens_per_s for r in rows) * 1.25])
        axes.plot(ends, ends, color="black", linewidth=0.8)
        axes.fill_between(ends, ends / 1.2, ends * 1.2, color="black", alpha=0.08, linewidth=0)
        axes.set(xscale="log", yscale="log", title=name, xlabel="published tokens/s per GPU", ylabel="planned")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Fits, judges and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", action="store_true", help="judge the stored constants; fit nothing")
    parser.add_argument("--plot", type=Path, help="draw planned against published speeds")
    asked = parser.parse_args()
    to_fit, held_out = sides()
    constants = dict(FITTED) if asked.judge else fit(to_fit)
    if not asked.judge:
        print("\n".join(f'    "{name}": {value:.4g},' for name, value in constants.items()))
    groups = {}
    for name, rows in (("families that were fitted", to_fit), ("families held out", held_out)):
        values = [planned(row, constants) for row in rows]
        groups[name] = rows, values
        print(f"\n{name}:\n", *table(rows, values), sep="\n")
        flat = errors([v / r.tokens_per_s for r, v in zip(rows, one_mfu(rows, to_fit), strict=True)])
        print("\nwith one share of the peak for all: {:.0%}, nine of ten within {:.0%}".format(*flat))
    apart = [abs(math.log(v / r.tokens_per_s)) for r, v in zip(*groups["families held out"], strict=True)]
    print(f'\n    "spread": {math.expm1(float(np.quantile(apart, 0.9))):.2f},  # nine of ten runs of families held out')
    if asked.plot is not None:
        draw(asked.plot, groups)


if __name__ == "__main__":
    main()
