"""The picture of a diagnosis: gradients of experts, layers against layers, coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from megatron_samoe.evaluation.plots import colour, grid, png_of, side_by_side
from megatron_samoe.parsing import JsonObject


def diagnosis_plot(diagnosis: JsonObject) -> bytes:
    """Returns the picture of one checkpoint, an entry of what `diagnose --json` writes, as PNG."""
    has_gradients, has_coefficients = diagnosis["layers"] is not None, diagnosis["coefficients_2LP"] is not None
    figure, (worth, common, *others) = side_by_side(2 + 3 * has_gradients + 2 * has_coefficients, width=6.0)
    worth_L = np.array(diagnosis["worth_L"])
    worth.bar(np.arange(len(worth_L)), worth_L, color=colour(0))
    worth.set_yscale("symlog", linthresh=0.01)
    worth.set(title="loss without a layer's experts, beyond the model's (nats)", xlabel="MoE layer")
    beyond_LL = np.array(diagnosis["overlap_LL"]) - np.array(diagnosis["chance_LL"])
    np.fill_diagonal(beyond_LL, np.nan)
    limit = max(float(np.nanmax(np.abs(beyond_LL), initial=0)), 1e-3)
    _matrix(figure, common, beyond_LL, "choices in common, beyond chance", limit)
    if has_gradients:
        _gradients(figure, others[:3], diagnosis)
    for row, axes in enumerate(others[3:]):
        weights_2LP = np.array(diagnosis["coefficients_2LP"])
        limit = float(np.abs(weights_2LP).max())
        _matrix(figure, axes, weights_2LP[row], f"coefficients of w{row + 1}", limit, "bank")
    return png_of(figure, worth, *others[: 2 * has_gradients])


def _gradients(figure: Any, panels: Sequence[Axes], diagnosis: JsonObject) -> None:
    size, alignment, cosines = panels
    views = {kind: diagnosis[kind + "s"] for kind in ("layer", "bank") if diagnosis[kind + "s"] is not None}
    _spread(size, views, "rms_NE", "gradient RMS of an expert's element")
    size.set_yscale("log")
    _spread(alignment, views, "alignment_NE", f"alignment over {diagnosis['batches']} batches")
    alignment.axhline(1 / diagnosis["batches"], color="0.5", linestyle="--", label="unrelated batches")
    similarity_LL = np.array(diagnosis["similarity_LL"], dtype=float)
    _matrix(figure, cosines, similarity_LL, "cosine of what two layers want,\nexperts of one number", 1.0)


def _spread(axes: Axes, views: Mapping[str, JsonObject], what: str, title: str) -> None:
    """Draws the mean over a set's experts, with a line from the least to the most."""
    names: list[str] = []
    for (kind, view), mark in zip(views.items(), "os", strict=False):
        values_NE = np.array(view[what])
        at = len(names) + np.arange(len(values_NE))
        mean = values_NE.mean(1)
        errors = np.array([mean - values_NE.min(1), values_NE.max(1) - mean])
        axes.errorbar(at, mean, yerr=np.maximum(errors, 0), fmt=mark, capsize=2, label=f"{kind}: mean, least to most")
        names += [f"{kind[0]}{n}" for n in range(len(values_NE))]
    axes.set_xticks(range(len(names)), names)
    axes.set(title=title)


def _matrix(figure: Any, axes: Axes, values: np.ndarray, title: str, limit: float, across: str = "MoE layer") -> None:
    figure.colorbar(grid(axes, values, cmap="RdBu_r", vmin=-limit, vmax=limit), ax=axes)
    axes.set(title=title, xlabel=across, ylabel="MoE layer")
