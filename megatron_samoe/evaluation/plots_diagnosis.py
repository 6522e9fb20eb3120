"""The picture of a diagnosis: gradients of experts, layers against layers, coefficients."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from megatron_samoe.evaluation.diagnosis import Diagnosis, GradientView
from megatron_samoe.evaluation.plots import grid, png_of, side_by_side


def diagnosis_plot(diagnosis: Diagnosis) -> bytes:
    """Returns the picture of one checkpoint as PNG."""
    figure, panels = side_by_side(6, width=6.0)
    views = [("layer", diagnosis.layers)] + ([("bank", diagnosis.banks)] if diagnosis.banks is not None else [])
    _spread(panels[0], views, "rms_NE", "gradient RMS of an expert's element")
    panels[0].set_yscale("log")
    _spread(panels[1], views, "alignment_NE", f"alignment over {diagnosis.batches} batches")
    panels[1].axhline(1 / diagnosis.batches, color="0.5", linestyle="--", label="unrelated batches")
    panels[1].legend()
    _matrix(figure, panels[2], diagnosis.similarity_LL, "cosine of two layers' gradients,\nexperts of one number", 1.0)
    beyond_LL = diagnosis.overlap_LL - diagnosis.chance_LL
    np.fill_diagonal(beyond_LL, np.nan)
    _matrix(
        figure,
        panels[3],
        beyond_LL,
        "choices in common, beyond chance",
        max(float(np.nanmax(np.abs(beyond_LL), initial=0)), 1e-3),
    )
    for axes, row, name in zip(panels[4:], (0, 1), ("w1", "w2"), strict=True):
        if diagnosis.coefficients_2LP is None:
            axes.axis("off")
            continue
        limit = float(np.abs(diagnosis.coefficients_2LP).max())
        _matrix(figure, axes, diagnosis.coefficients_2LP[row], f"coefficients of {name}", limit, "bank")
    return png_of(figure)


def _spread(axes: Axes, views: list[tuple[str, GradientView]], what: str, title: str) -> None:
    """Draws the mean over a set's experts, with a line from the least to the most."""
    start, names = 0, []
    for (kind, view), mark in zip(views, "os", strict=False):
        values_NE = getattr(view, what)
        at = start + np.arange(len(values_NE))
        mean = values_NE.mean(1)
        errors = np.array([mean - values_NE.min(1), values_NE.max(1) - mean])
        axes.errorbar(at, mean, yerr=np.maximum(errors, 0), fmt=mark, capsize=2, label=f"{kind}: mean, least to most")
        names += [f"{kind[0]}{n}" for n in range(len(values_NE))]
        start += len(values_NE)
    axes.set_xticks(range(len(names)), names)
    axes.set(title=title)
    axes.grid(alpha=0.3)
    axes.legend()


def _matrix(figure: Any, axes: Axes, values: np.ndarray, title: str, limit: float, across: str = "MoE layer") -> None:
    figure.colorbar(grid(axes, values, cmap="RdBu_r", vmin=-limit, vmax=limit), ax=axes)
    axes.set(title=title, xlabel=across, ylabel="MoE layer")
