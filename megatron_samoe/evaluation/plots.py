"""Plots of runs, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from megatron_samoe.evaluation.run_summary import RunSummary


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def loss_curves(runs: Sequence[RunSummary]) -> bytes:
    """Training loss (thin) and validation loss (dots) over consumed tokens."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for run in runs:
        (line,) = axes.plot(
            [r["consumed_tokens"] for r in run.records], [r["lm_loss"] for r in run.records], alpha=0.5, linewidth=1
        )
        held_out = [r for r in run.records if "validation_loss" in r]
        axes.plot(
            [r["consumed_tokens"] for r in held_out], [r["validation_loss"] for r in held_out], "o-",
            color=line.get_color(), label=f"{run.name}: validation",
        )  # fmt: skip
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Loss: training (thin) and validation (dots)")
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(figure)


def _last(run: RunSummary, key: str) -> Any:
    return next((r[key] for r in reversed(run.records) if key in r), None)


def _heat_maps(
    runs: Sequence[RunSummary], key: str, title: str, draw: Callable[[Axes, np.ndarray], Any], x_label: str
) -> bytes | None:
    shown = [(run, np.asarray(value)) for run in runs if (value := _last(run, key)) is not None]
    if not shown:
        return None
    figure, all_axes = plt.subplots(1, len(shown), figsize=(6 * len(shown), 4.2), squeeze=False, layout="constrained")
    for axes, (run, values) in zip(all_axes[0], shown, strict=True):
        image = draw(axes, values)
        figure.colorbar(image, ax=axes)
        axes.set_title(f"{run.name}: {title}")
        axes.set_xlabel(x_label)
        axes.set_ylabel("MoE layer")
    return _png(figure)


def expert_load(runs: Sequence[RunSummary]) -> bytes | None:
    """Share of tokens per layer and expert in the last logged step, relative to an even share."""

    def draw(axes: Axes, load_LE: np.ndarray) -> Any:
        return _grid(axes, load_LE * load_LE.shape[1], cmap="RdBu_r", vmin=0, vmax=2)

    return _heat_maps(runs, "expert_load", "expert load (1 = even)", draw, "expert")


def gradient_norms(runs: Sequence[RunSummary]) -> bytes | None:
    """Gradient norm of every layer's expert in the last logged step, logarithmic."""

    def draw(axes: Axes, norms_LE: np.ndarray) -> Any:
        return _grid(axes, np.log10(np.maximum(norms_LE, 1e-12)), cmap="viridis", decimals=1)

    return _heat_maps(runs, "expert_grad_norm", "log10 gradient norm per expert", draw, "expert")


def combinations(runs: Sequence[RunSummary]) -> bytes | None:
    """Learned coefficients, layers x banks, for input and output projections (mean over experts where each has its own)."""
    shown = [(run, value) for run in runs if (value := _last(run, "combination")) is not None]
    if not shown:
        return None
    figure, all_axes = plt.subplots(len(shown), 2, figsize=(10, 4.2 * len(shown)), squeeze=False, layout="constrained")
    for row, (run, nested) in zip(all_axes, shown, strict=True):
        a_2LP = np.stack([np.asarray(layer).mean(1) for layer in nested], axis=1)
        limit = np.abs(a_2LP).max()
        for axes, a_LP, what in zip(row, a_2LP, ("input (w1)", "output (w2)"), strict=True):
            image = _grid(axes, a_LP, cmap="RdBu_r", vmin=-limit, vmax=limit, decimals=3)
            figure.colorbar(image, ax=axes)
            axes.set_title(f"{run.name}: coefficients, {what}")
            axes.set_xlabel("bank")
            axes.set_ylabel("MoE layer")
    return _png(figure)


def _grid(axes: Axes, values: np.ndarray, decimals: int = 2, **options: Any) -> Any:
    image = axes.imshow(values, aspect="auto", **options)
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(values.shape[0]))
    if values.size <= 160:
        for (row, column), value in np.ndenumerate(values):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
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
