"""Quality against what it costs: validation loss over parameters, bytes and milliseconds per decoded token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from megatron_samoe.evaluation.measurements import DecodeTime, of_group
from megatron_samoe.evaluation.plots import colour, png_of, side_by_side
from megatron_samoe.evaluation.run_groups import Groups

#: Bytes of weights per decoded token: by group and batch size.
BytesPerToken = Mapping[str, Mapping[int, float]]
#: Room that a dot of a plot takes.
DOT_INCHES = 0.12


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


def places_beside(points: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Returns by how many dots each model is moved aside, so that none hides another.

    Args:
        points: across and up, as shares of the axes.
    """
    runs: list[list[str]] = []
    for name in sorted(points, key=lambda name: points[name]):
        x, y = points[name]
        near = (run for run in runs if any(abs(x - points[n][0]) < 0.03 and abs(y - points[n][1]) < 0.1 for n in run))
        run = next(near, None)
        if run is None:
            runs.append([name])
        else:
            run.append(name)
    return {name: place - (len(run) - 1) / 2 for run in runs for place, name in enumerate(run)}


def quality_against_cost(groups: Groups, axes_by_cost: Mapping[str, Mapping[str, float]]) -> bytes:
    """Validation loss (mean, and deviation over seeds) over every cost; lower and further left is better."""
    figure, panels = side_by_side(len(axes_by_cost), width=5.0, sharey=True)
    handles: dict[str, Any] = {}
    losses = {group.name: group.loss.mean for group in groups}
    height = max(losses.values()) - min(losses.values()) or 1.0
    for axes, (cost, values) in zip(panels, axes_by_cost.items(), strict=True):
        axes.set_xlabel(cost)
        axes.grid(alpha=0.3, which="both")
        shown = [v for v in values.values() if v > 0]
        is_log = bool(shown) and max(shown) > 5 * min(shown)
        if is_log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlim(min(shown) / 1.3, max(shown) * 1.3)
        elif shown:
            # Costs that hardly differ stand close together, and not at the ends of an axis made for them.
            margin = max(0.08 * (max(shown) - min(shown)), 0.15 * max(shown))
            axes.set_xlim(min(shown) - margin, max(shown) + margin)
        scale = math.log if is_log else float
        width = abs(scale(axes.get_xlim()[1]) - scale(axes.get_xlim()[0]))
        places = places_beside({n: (scale(v) / width, losses[n] / height) for n, v in values.items() if v > 0})
        for place, group in enumerate(groups):
            if group.name in values:
                loss = group.loss
                error = None if math.isnan(loss.sd) else [loss.sd]
                aside = ScaledTranslation(places.get(group.name, 0.0) * DOT_INCHES, 0, figure.dpi_scale_trans)
                handles[group.name] = axes.errorbar([values[group.name]], [loss.mean], yerr=error, fmt="o", capsize=3,
                                                    color=colour(place), transform=axes.transData + aside)  # fmt: skip
                # Axes take no notice of what is drawn aside.
                spread = 0.0 if error is None else error[0]
                axes.update_datalim([(values[group.name], loss.mean + end) for end in (-spread, spread)])
        axes.autoscale_view()
    for axes in panels[::2]:
        axes.set_ylabel("validation loss (nats per token)")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return png_of(figure)
