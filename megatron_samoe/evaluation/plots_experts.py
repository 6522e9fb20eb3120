"""Plots of experts over a run: balance of their load, their gradients, and a SaMoE's combinations."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from megatron_samoe.evaluation.plots import colour, finished, label_log, label_tokens, png_of
from megatron_samoe.evaluation.run_groups import Groups
from megatron_samoe.evaluation.run_summary import RunSummary

#: Layers that a plot of combinations has room for.
MAX_LAYERS = 8


def load_entropy(load_LE: np.ndarray) -> np.ndarray:
    """Returns each layer's entropy of the load, [L], as a share of an even load's: 1 is even, 0 all to one expert."""
    share_LE = load_LE / np.maximum(load_LE.sum(-1, keepdims=True), 1e-30)
    entropy_L = -(share_LE * np.log(np.maximum(share_LE, 1e-30))).sum(-1)
    return entropy_L / math.log(load_LE.shape[1]) if load_LE.shape[1] > 1 else np.ones(load_LE.shape[0])


def entropy_curve(run: RunSummary) -> tuple[np.ndarray, np.ndarray]:
    """Returns (consumed tokens [N], entropy of the load [N, L]) of a run's records."""
    records = [r for r in run.trained if "expert_load" in r]
    tokens_N = np.array([r["consumed_tokens"] for r in records], dtype=np.float64)
    return tokens_N, np.array([load_entropy(np.asarray(r["expert_load"])) for r in records])


def mean_entropy(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens [N], entropy [N]): the mean over layers and seeds where all seeds logged."""
    shared_N = functools.reduce(np.intersect1d, [tokens_N for tokens_N, _ in curves])
    return shared_N, np.mean([h_NL[np.isin(tokens_N, shared_N)].mean(1) for tokens_N, h_NL in curves], axis=0)


def load_entropies(groups: Groups) -> bytes | None:
    """Entropy of the load over training: mean over layers and seeds, and the range of layers of the first seed."""
    figure, axes = plt.subplots(figsize=(8, 4))
    for number, group in enumerate(groups):
        curves = [entropy_curve(run) for run in group.runs]
        curves = [(tokens_N, h_NL) for tokens_N, h_NL in curves if len(tokens_N)]
        if curves:
            tokens_N, h_NL = curves[0]
            axes.fill_between(tokens_N, h_NL.min(1), h_NL.max(1), color=colour(number), alpha=0.12, linewidth=0)
            axes.plot(*mean_entropy(curves), color=colour(number), label=group.name)
    axes.set(xlabel="training tokens", ylabel="entropy of load / entropy of an even load")
    label_tokens(axes)
    return finished(figure, axes, bool(axes.lines))


def expert_gradient(run: RunSummary) -> np.ndarray | None:
    """Returns the mean gradient norm per expert of each MoE layer, [L], over the second half of the records."""
    norms = [np.asarray(r["expert_grad_norm"]) for r in run.trained if "expert_grad_norm" in r]
    return np.mean(norms[len(norms) // 2 :], axis=0).mean(1) if norms else None


def gradients_against_experts(groups: Groups) -> bytes | None:
    """Gradient norm per expert of every layer over the number of experts per layer, logarithmic in both.

    An expert that gets fewer tokens gets a smaller gradient; a bank that all layers share gathers theirs.
    """
    figure, axes = plt.subplots(figsize=(8, 4.2))
    counts = []
    for number, group in enumerate(groups):
        found = [norms_L for run in group.runs if (norms_L := expert_gradient(run)) is not None]
        if not found:
            continue
        norms_L = np.mean(found, axis=0)
        num_experts = float(np.mean(group.first.config.moe.expert_counts))
        counts.append(num_experts)
        # Beside each other, first layer left: models of one number of experts would hide each other.
        x = num_experts * 2.0 ** (0.06 * (number - (len(groups) - 1) / 2) + 0.02 * np.linspace(-1, 1, len(norms_L)))
        axes.plot(x, norms_L, "o", markersize=4, alpha=0.7, color=colour(number))
        axes.plot(
            [x.mean()],
            [norms_L.mean()],
            "_",
            markersize=22,
            markeredgewidth=2.5,
            color=colour(number),
            label=group.name,
        )
    if counts:
        axes.set(xscale="log", yscale="log", xlabel="experts per layer", ylabel="gradient norm per expert")
        ticks = sorted(set(counts))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        label_log(axes.yaxis)
        axes.set_xlim(min(ticks) / 1.5, max(ticks) * 1.5)
    return finished(figure, axes, bool(counts))


def combination_evolution(groups: Groups) -> bytes | None:
    """Coefficients over training, a row per model (first seed), a column per layer: full w1, dashed w2, a colour per bank."""
    shown = []
    for group in groups:
        records = [r for r in group.first.trained if "combination" in r]
        if len(records) > 1:
            tokens_N = [r["consumed_tokens"] for r in records]
            # [N, L, 2, G, P], mean over experts where each has its own
            shown.append((group, tokens_N, np.array([r["combination"] for r in records]).mean(3)))
    if not shown:
        return None
    columns = min(MAX_LAYERS, max(a_NL2P.shape[1] for _, _, a_NL2P in shown))
    figure, panels = plt.subplots(
        len(shown),
        columns,
        figsize=(max(6.0, 1.9 * columns), 2.4 * len(shown)),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for row, (group, tokens_N, a_NL2P) in zip(panels, shown, strict=True):
        layers = np.unique(np.linspace(0, a_NL2P.shape[1] - 1, columns).round().astype(int))
        for axes in row[len(layers) :]:
            axes.axis("off")
        for axes, layer in zip(row, layers, strict=False):
            for bank in range(a_NL2P.shape[3]):
                for which, style in enumerate(("-", "--")):
                    axes.plot(tokens_N, a_NL2P[:, layer, which, bank], style, color=colour(bank), linewidth=1.3)
            axes.set_title(f"layer {layer}", fontsize=9)
            axes.tick_params(labelsize=7)
            label_tokens(axes, most=3)
            axes.grid(alpha=0.3)
        row[0].set_ylabel(group.name, fontsize=9)
    figure.supxlabel("training tokens", fontsize=9)
    banks = max(a_NL2P.shape[3] for _, _, a_NL2P in shown)
    lines = [Line2D([], [], color=colour(bank), label=f"bank {bank}") for bank in range(banks)]
    lines += [
        Line2D([], [], color="#7f7f7f", linestyle=style, label=which) for style, which in (("-", "w1"), ("--", "w2"))
    ]
    figure.legend(handles=lines, loc="outside upper left", ncols=len(lines), fontsize=9)
    return png_of(figure)
