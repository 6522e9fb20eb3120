"""Plots of runs, as PNG bytes: losses, and the last logged step's loads, gradients and combinations."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import EngFormatter, FormatStrFormatter, Formatter, LogLocator, MaxNLocator, NullFormatter

from megatron_samoe.evaluation.run_groups import Groups, RunGroup
from megatron_samoe.evaluation.run_summary import RunSummary

#: One colour and one shape per model, the same in all plots of a report. The colours are those of Okabe and Ito, which
#: people distinguish whatever colours they see, their yellow left out.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9", "#7f7f7f")
MARKERS = "osD^vP*Xh<"
#: A legend on the right of its plot.
OUTSIDE = {"fontsize": 8, "loc": "center left", "bbox_to_anchor": (1.01, 0.5)}


def colour(number: int) -> str:
    """Returns the colour of a report's n-th model."""
    return COLOURS[number % len(COLOURS)]


def marker(number: int) -> str:
    """Returns the shape of a report's n-th model."""
    return MARKERS[number % len(MARKERS)]


def png_of(figure: Any, *panels: Axes, **legend: Any) -> bytes:
    """Returns a figure as PNG and closes it. Panels that are given get a grid, and a legend of what has a label."""
    for axes in panels:
        axes.grid(alpha=0.3, which="both" if axes.get_xscale() == "log" else "major")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(**legend)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def finished(figure: Any, axes: Axes, is_drawn: bool = True) -> bytes | None:
    """Returns a plot of one panel as PNG, with grid and legend; None where nothing is drawn in it."""
    if is_drawn:
        return png_of(figure, axes)
    plt.close(figure)
    return None


def side_by_side(count: int, width: float, **options: Any) -> tuple[Any, list[Axes]]:
    """Returns a figure and its panels, of a width in inches, two in a row."""
    columns = min(2, count)
    rows = -(-count // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(width * columns, 3.6 * rows), squeeze=False, layout="constrained", **options
    )
    for axes in panels.flat[count:]:
        axes.axis("off")
    return figure, list(panels.flat[:count])


def label_log(axis: Axis, formatter: Formatter | None = None) -> None:
    """Writes 1, 2 and 5 of each decade of a logarithmic axis, in one notation."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(formatter or FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())


def label_tokens(axes: Axes, most: int | None = None) -> None:
    """Writes the horizontal axis in k, M and G, with at most `steps` steps."""
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if axes.get_xscale() == "log":
        label_log(axes.xaxis, EngFormatter(sep=""))
    if most is not None:
        axes.xaxis.set_major_locator(MaxNLocator(most))


def loss_curves(groups: Groups) -> bytes | None:
    """Training loss (thin, every seed) and validation loss (marks: mean over seeds, bars: range) over consumed tokens; next to it
    what parts the models: their differences from the dense one, or from the first.
    """
    if not any(run.trained for group in groups for run in group.runs):
        return None
    trained = [group for group in groups if any(run.trained for run in group.runs)]
    base = next((group for group in trained if group.expert_layout == "dense"), trained[0])
    figure, panels = side_by_side(min(2, len(trained)), width=6.5)
    for number, group in enumerate(groups):
        for run in group.runs:
            tokens, losses = [r["consumed_tokens"] for r in run.trained], [r["lm_loss"] for r in run.trained]
            panels[0].plot(tokens, losses, alpha=0.7, linewidth=1.0, color=colour(number))
        at = _validation(group)
        if at:
            means = [np.mean(values) for values in at.values()]
            spans = np.array([(m - min(v), max(v) - m) for m, v in zip(means, at.values(), strict=True)]).T
            panels[0].errorbar(
                [*at],
                means,
                yerr=np.maximum(spans, 0.0),
                fmt=f"{marker(number)}-",
                markersize=5,
                linewidth=2,
                capsize=2,
                color=colour(number),
                label=f"{group.name}: validation",
            )
        if len(panels) > 1 and group in trained:
            _difference(panels[1], group, base, colour(number), marker(number))
    panels[0].set(xscale="log", xlabel="training tokens", ylabel="loss (nats per token)")
    if len(panels) > 1:
        panels[1].set(xlabel="training tokens", ylabel=f"loss minus that of {base.name}")
    for axes in panels:
        label_tokens(axes)
    return png_of(figure, *panels, fontsize=8)


def _validation(group: RunGroup) -> dict[int, list[float]]:
    """Returns the validation losses of a model's seeds by consumed tokens, in their order."""
    at: dict[int, list[float]] = {}
    for run in group.runs:
        for record in run.trained:
            if "validation_loss" in record:
                at.setdefault(record["consumed_tokens"], []).append(record["validation_loss"])
    return dict(sorted(at.items()))


def _smoothed(group: RunGroup) -> dict[int, float]:
    """Returns training losses by consumed tokens: means over seeds and over a twentieth of the run before."""
    at: dict[int, list[float]] = {}
    for run in group.runs:
        losses = np.array([r["lm_loss"] for r in run.trained])
        width = max(1, len(losses) // 20)
        sums = np.cumsum([0.0, *losses])
        for end, record in enumerate(run.trained, 1):
            if end >= width:
                at.setdefault(record["consumed_tokens"], []).append((sums[end] - sums[end - width]) / width)
    return {tokens: float(np.mean(values)) for tokens, values in sorted(at.items())}


def _difference(axes: Axes, group: RunGroup, base: RunGroup, shade: str, shape: str) -> None:
    """Draws how far a model is from another after the first tenth of training: a line of training, marks of validation."""
    ours, theirs = _smoothed(group), _smoothed(base)
    shared = [tokens for tokens in ours if tokens in theirs and tokens >= 0.1 * max(theirs)]
    axes.plot(shared, [ours[t] - theirs[t] for t in shared], color=shade, linewidth=1.2, label=group.name)
    valid, others = _validation(group), _validation(base)
    marks = [tokens for tokens in valid if tokens in others and tokens >= 0.1 * max(theirs)]
    axes.plot(marks, [np.mean(valid[t]) - np.mean(others[t]) for t in marks], shape, color=shade, markersize=5)


def last_value(run: RunSummary, key: str) -> Any:
    """Returns a key's value in the last record with that key, None without one."""
    return next((r[key] for r in reversed(run.records) if key in r), None)


def _heat_maps(groups: Groups, key: str, what: str, draw: Callable[[Axes, np.ndarray], Any]) -> bytes | None:
    """A map of layers x experts for the first run of each group, two in a row."""
    shown = [(g, np.asarray(value)) for g in groups if (value := last_value(g.first, key)) is not None]
    if not shown:
        return None
    figure, panels = side_by_side(len(shown), width=6.0)
    for axes, (group, values) in zip(panels, shown, strict=True):
        figure.colorbar(draw(axes, values), ax=axes, label=what)
        axes.set(title=group.name, xlabel="expert", ylabel="MoE layer")
    return png_of(figure)


def expert_load(groups: Groups) -> bytes | None:
    """Share of tokens per layer and expert in the last logged step, relative to an even share."""

    def draw(axes: Axes, load_LE: np.ndarray) -> Any:
        return grid(axes, load_LE * load_LE.shape[1], cmap="RdBu_r", vmin=0, vmax=2)

    return _heat_maps(groups, "expert_load", "load / even load", draw)


def gradient_norms(groups: Groups) -> bytes | None:
    """Gradient norm of every layer's expert in the last logged step, log10; grey where there was none."""

    def draw(axes: Axes, norms_LE: np.ndarray) -> Any:
        with np.errstate(divide="ignore"):
            logs_LE = np.where(norms_LE > 0, np.log10(norms_LE), np.nan)
        return grid(axes, logs_LE, cmap="viridis", decimals=1)

    return _heat_maps(groups, "expert_grad_norm", "log10 of the gradient norm", draw)


def combinations(groups: Groups) -> bytes | None:
    """Learned coefficients, layers x banks, for input and output projections (mean over experts where each has its own)."""
    shown = [(g, value) for g in groups if (value := last_value(g.first, "combination")) is not None]
    if not shown:
        return None
    figure, panels = side_by_side(2 * len(shown), width=5.0)
    for row, (group, nested) in zip(zip(panels[::2], panels[1::2], strict=True), shown, strict=True):
        a_2LP = np.stack([np.asarray(layer).mean(1) for layer in nested], axis=1)
        limit = np.abs(a_2LP).max()
        for axes, a_LP, what in zip(row, a_2LP, ("input (w1)", "output (w2)"), strict=True):
            image = grid(axes, a_LP, cmap="RdBu_r", vmin=-limit, vmax=limit, decimals=3)
            figure.colorbar(image, ax=axes, label="coefficient")
            axes.set(title=f"{group.name}: {what}", xlabel="bank", ylabel="MoE layer")
    return png_of(figure)


def grid(axes: Axes, values: np.ndarray, decimals: int = 2, **options: Any) -> Any:
    """Draws a matrix as coloured fields, grey for nan, with numbers where there is room for them."""
    cmap = plt.get_cmap(options.pop("cmap")).with_extremes(bad="#c9ced6")
    image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", cmap=cmap, **options)
    for set_ticks, length in ((axes.set_xticks, values.shape[1]), (axes.set_yticks, values.shape[0])):
        set_ticks(range(0, length, -(-length // 16)))
    if values.size <= 160:
        for (row, column), value in np.ndenumerate(values):
            if np.isnan(value):
                continue
            dark = np.dot(image.to_rgba(value)[:3], (0.3, 0.6, 0.1)) < 0.5
            axes.text(
                column,
                row,
                f"{value:.{decimals}f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "black",
            )
    return image
