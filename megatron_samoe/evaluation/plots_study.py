"""Plots of a study's results.json: differences with their intervals, sweeps' optima, losses over training lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from megatron_samoe.evaluation.plots import OUTSIDE, colour, finished, plt, png_of
from megatron_samoe.parsing import JsonObject


def differences(study: JsonObject) -> bytes | None:
    """Returns each model's difference from the baseline as PNG: every seed, the mean, and the 95 % interval; None without any
    model to compare."""
    variants = {v["name"]: v for v in study["variants"]}
    base = variants[study["baseline"]]
    others = [v for v in study["variants"] if v["difference"] is not None]
    if not others:
        return None
    figure, axes = plt.subplots(figsize=(8.5, 1.4 + 0.55 * len(others)), layout="constrained")
    if margin := study["margin"]:
        axes.axvspan(-margin, margin, color="0.9", label=f"equally good: within {margin:g} nats")
    axes.axvline(0, color="0.4", linewidth=1)
    rows, means = np.arange(len(others)), [v["difference"]["mean"] for v in others]
    for key, width, shade, what in (
        ("pooled_half_width", 5.0, 0.35, "95 %, spread of all models"),
        ("half_width", 1.6, 1.0, "95 %, own spread"),
    ):
        halves = np.array([v["difference"][key] for v in others], dtype=float)
        axes.errorbar(means, rows, xerr=halves, fmt="none", ecolor=colour(0), elinewidth=width, alpha=shade, label=what)
    for row, variant in enumerate(others):
        each = np.array(variant["losses"], dtype=float) - np.array(base["losses"], dtype=float)
        axes.plot(each, np.full(len(each), row + 0.22), ".", color="0.45", label="" if row else "a seed")
    axes.plot(means, rows, "o", color=colour(0), label="mean")
    axes.set_yticks(range(len(others)), [v["name"] for v in others])
    axes.invert_yaxis()
    axes.set(
        xlabel=f"{study.get('loss', 'validation loss')} minus that of {study['baseline']}, nats per token (left is better)"
    )
    return png_of(figure, axes, **OUTSIDE)


def lengths(study: JsonObject) -> bytes | None:
    """Returns the losses of each model over its length of training as PNG; None for a study of one length."""
    points = _points(study)
    if len({steps for line in points.values() for steps, _, _ in line}) < 2:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (name, line) in enumerate(points.items()):
        steps, means, sds = (np.array(values) for values in zip(*sorted(line), strict=True))
        axes.errorbar(steps, means, yerr=np.nan_to_num(sds), fmt="o-", capsize=2, color=colour(number), label=name)
    axes.set(
        xlabel="steps, each length with a decay of its own", ylabel="validation loss, nats per token", xscale="log"
    )
    axes.set_title("bars: standard deviation over seeds", fontsize=9)
    return finished(figure, axes)


def _points(study: JsonObject) -> Mapping[str, list[tuple[int, float, float]]]:
    """Returns (steps, mean, standard deviation) of the trained models at each size, which may be a length."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for comparison in (study, *study["others"]):
        for variant in comparison["variants"]:
            if variant["steps"] is not None:
                sd = math.nan if variant["sd"] is None else variant["sd"]
                found.setdefault(variant["name"], []).append((variant["steps"], variant["mean"], sd))
    return found
