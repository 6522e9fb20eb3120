"""Quality against what it costs: validation loss over parameters, bytes and milliseconds per decoded token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from scipy.optimize import isotonic_regression

from megatron_samoe.evaluation.measurements import DecodeTime, of_group
from megatron_samoe.evaluation.plots import colour, label_log, marker, png_of, side_by_side
from megatron_samoe.evaluation.run_groups import Groups, RunGroup

#: Bytes of weights per decoded token: by group and batch size.
BytesPerToken = Mapping[str, Mapping[int, float]]


def cost_axes(
    groups: Groups, decode: Sequence[DecodeTime], bytes_per_token: BytesPerToken
) -> dict[str, dict[str, float]]:
    """Returns {what a model costs: {group: how much}}, in the order of the report."""
    axes: dict[str, dict[str, float]] = {
        "total parameters (M)": {g.name: g.first.parameters.total / 1e6 for g in groups},
        "active parameters (M)": {g.name: g.first.parameters.active / 1e6 for g in groups},
    }
    for batch in sorted({b for of_batch in bytes_per_token.values() for b in of_batch}):
        axes[f"weights read per decoded token (MB), batch {batch}"] = {
            name: of_batch[batch] / 1e6 for name, of_batch in bytes_per_token.items() if batch in of_batch
        }
    ways = sorted({(row.dtype, row.batch) for row in decode})
    for dtype, batch in ways:
        found = {}
        for group in groups:
            rows = [r for r in of_group(group, decode) if (r.dtype, r.batch) == (dtype, batch)]
            if rows:
                # A step makes one token of each sequence; per token is what a user of a full batch pays.
                found[group.name] = min(r.ms_per_token for r in rows) / batch
        if found:
            axes[f"measured ms per decoded token, batch {batch}, {dtype}"] = found
    return axes


def spread_apart(wanted: Sequence[float], least: float) -> list[float]:
    """Returns positions near the wanted ones, in their order, of which no two are closer than `least`."""
    order, steps = np.argsort(wanted, kind="stable"), least * np.arange(len(wanted))
    heights = np.empty(len(wanted))
    heights[order] = isotonic_regression(np.take(wanted, order) - steps).x + steps
    return [float(height) for height in heights]


def _scale_costs(axes: Axes, costs: Sequence[float]) -> None:
    """Chooses scale and limits of the horizontal axis."""
    if costs and max(costs) > 5 * min(costs):
        axes.set_xscale("log")
        label_log(axes.xaxis)
        axes.set_xlim(min(costs) / 1.3, max(costs) * 1.3)
    elif costs:
        # Costs that hardly differ are close together, and not at the ends of an axis made for them.
        margin = max(0.08 * (max(costs) - min(costs)), 0.15 * max(costs))
        axes.set_xlim(min(costs) - margin, max(costs) + margin)


def _draw(axes: Axes, number: int, group: RunGroup, cost: float) -> Any:
    """Draws a model where it belongs, in a shape and size of its own, empty: so it shows where another is, too."""
    error = None if math.isnan(group.loss.sd) else [group.loss.sd]
    return axes.errorbar(
        [cost],
        [group.loss.mean],
        yerr=error,
        fmt=marker(number),
        markersize=max(22 * 0.78**number, 4),
        markerfacecolor="none",
        markeredgewidth=2,
        capsize=3,
        color=colour(number),
    )


def at_a_glance(groups: Groups) -> bytes | None:
    """Validation loss over all parameters, with every model's name; names make room for each other, points do not. None for one
    model, of which a point says nothing."""
    if len(groups) < 2:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    costs = [group.first.parameters.total / 1e6 for group in groups]
    for number, (group, cost) in enumerate(zip(groups, costs, strict=True)):
        _draw(axes, number, group, cost)
    _scale_costs(axes, costs)
    axes.margins(y=0.12)
    axes.autoscale_view(scalex=False)
    low, high = axes.get_ylim()
    names = spread_apart([(group.loss.mean - low) / (high - low) for group in groups], 0.07)
    for number, (group, cost, height) in enumerate(zip(groups, costs, names, strict=True)):
        axes.annotate(
            group.name,
            (cost, group.loss.mean),
            (1.04, height),
            textcoords="axes fraction",
            va="center",
            color=colour(number),
            arrowprops={"arrowstyle": "-", "color": "#b8bec8", "linewidth": 0.8, "shrinkB": 8},
            annotation_clip=False,
        )
    axes.set(xlabel="parameters in all (M)", ylabel="validation loss (nats per token)")
    return png_of(figure, axes)


def quality_against_cost(groups: Groups, axes_by_cost: Mapping[str, Mapping[str, float]]) -> bytes | None:
    """Validation loss (mean, and deviation over seeds) over every cost; lower and further left is better. None for one model."""
    if len(groups) < 2:
        return None
    figure, panels = side_by_side(len(axes_by_cost), width=5.0, sharey=True)
    handles: dict[str, Any] = {}
    for axes, (cost, values) in zip(panels, axes_by_cost.items(), strict=True):
        axes.set_xlabel(cost)
        _scale_costs(axes, [v for v in values.values() if v > 0])
        for number, group in enumerate(groups):
            if group.name in values:
                handles[group.name] = _draw(axes, number, group, values[group.name])
        axes.margins(y=0.12)  # room for full markers
    for axes in panels[::2]:
        axes.set_ylabel("validation loss (nats per token)")
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, labelspacing=1.2
    )
    return png_of(figure, *panels)
