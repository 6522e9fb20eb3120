"""The plots of a report: every model in its colour, axes in one notation, nothing where nothing was logged."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_samoe.evaluation import plots, plots_experts
from megatron_samoe.evaluation.plots_quality import quality_against_cost, spread_apart
from megatron_samoe.evaluation.run_groups import RunGroup
from megatron_samoe.evaluation.run_summary import read_run
from tests.unit.evaluation.test_report import groups, runs_dir

__all__ = ["groups", "runs_dir"]


def test_entropy_of_the_load() -> None:
    load_LE = np.array([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    np.testing.assert_allclose(plots_experts.load_entropy(load_LE), [1.0, 0.0, 0.5])


def test_entropy_of_seeds_that_logged_at_different_times() -> None:
    curves = [([1.0, 2.0, 3.0], [[0.1], [0.2], [0.3]]), ([2.0, 4.0], [[0.4], [0.9]])]
    tokens_N, mean_N = plots_experts.mean_entropy([(np.array(t), np.array(h)) for t, h in curves])
    assert tokens_N.tolist() == [2.0] and mean_N == pytest.approx([0.3])


@settings(deadline=None)  # scipy loads what it needs in the first call
@given(st.lists(st.floats(0, 1), max_size=9))
def test_names_make_room_for_each_other(wanted: list[float]) -> None:
    """Two are never closer than they may be, keep their order, and stay where they were if there was room."""
    places = spread_apart(wanted, 0.1)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gaps = [places[b] - places[a] for a, b in pairwise(order)]
    assert all(gap > 0.1 - 1e-9 for gap in gaps)
    if all(wanted[b] - wanted[a] > 0.1 for a, b in pairwise(order)):
        assert places == pytest.approx(wanted)


def is_seen(place: int, image: np.ndarray) -> bool:
    """Returns whether a plot has the colour of a report's n-th model."""
    wanted = np.array([int(plots.colour(place)[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return (np.abs(image - wanted).max(-1) < 0.02).sum() > 10


def test_every_model_is_seen_in_every_plot_of_costs(groups: list[RunGroup]) -> None:
    same = {"some cost": {group.name: 2.0 for group in groups}, "another": {group.name: 2.0 for group in groups}}
    image = plt.imread(io.BytesIO(quality_against_cost(groups, same) or b""))[:, :, :3]
    panels = image[: int(0.8 * len(image))]  # without the legend
    for half in np.array_split(panels, 2, axis=1):
        for place in range(len(groups)):
            assert is_seen(place, half), place


def test_an_axis_has_one_notation() -> None:
    figure, axes = plt.subplots()
    axes.set(xscale="log", yscale="log", xlim=(2500, 52000), ylim=(0.015, 0.09))
    plots.label_tokens(axes)
    plots.label_log(axes.yaxis)
    figure.canvas.draw()
    x, y = ({text.get_text() for text in texts} for texts in (axes.get_xticklabels(), axes.get_yticklabels()))
    assert {"5k", "10k", "20k", "50k"} <= x and {"0.02", "0.05"} <= y
    minor = [text.get_text() for axis in (axes.xaxis, axes.yaxis) for text in axis.get_ticklabels(minor=True)]
    assert not any(minor)
    plt.close(figure)


def test_models_have_their_colours_where_the_first_has_no_experts(groups: list[RunGroup]) -> None:
    image = plt.imread(io.BytesIO(plots_experts.load_entropies(groups)))[:, :, :3]
    seen = [group.name for place, group in enumerate(groups) if is_seen(place, image)]
    assert groups[0].name == "dense" and seen == ["moe", "samoe"]


def test_gradients_are_means_over_the_second_half_and_experts(runs_dir: Path) -> None:
    found = plots_experts.expert_gradient(read_run(runs_dir / "moe/seed-1"))
    assert found is not None
    np.testing.assert_allclose(found, [3.5, 3.5])
    assert plots_experts.expert_gradient(read_run(runs_dir / "dense/seed-1")) is None


def test_plots_of_what_nobody_logged_are_left_out(groups: list[RunGroup]) -> None:
    dense, _, samoe, _ = groups
    logged = [plots.expert_load, plots.combinations, plots_experts.combination_evolution, plots_experts.load_entropies]
    for plot in (*logged, plots.gradient_norms, plots_experts.gradients_against_experts):
        assert plot([dense]) is None
    for plot in logged:
        assert plot([samoe])[:4] == b"\x89PNG"
