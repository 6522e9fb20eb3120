"""A study's page while it runs: the chart of losses has axes whose figures are where they say."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_samoe.evaluation.study.status_page import _curves
from megatron_samoe.parsing import JsonObject


def chart(**curves: list[tuple[int, float]]) -> str:
    """Returns the chart of a run for each variant."""
    runs = [SimpleNamespace(directory=Path(name), variant=SimpleNamespace(name=name), swept=None) for name in curves]
    records: dict[Path, list[JsonObject]] = {
        Path(name): [{"iteration": step, "validation_loss": loss} for step, loss in curve]
        for name, curve in curves.items()
    }
    return _curves(runs, records)  # type: ignore[arg-type]


def ticks(svg: str, anchor: str, place: str) -> dict[float, float]:
    """Returns the places of figures along an axis."""
    found = re.findall(rf'<text ([^>]*) text-anchor="{anchor}">([\d.,]+)</text>', svg)
    return {
        float(figure.replace(",", "")): float(re.search(rf'\b{place}="([\d.]+)"', where)[1])  # type: ignore[index]
        for where, figure in found
    }


@pytest.mark.parametrize(
    "curve", [[(250, 6.1), (4800, 4.3217)], [(0, 4.9501), (10, 4.9502)], [(1, 10.5), (3, 12_000.0)]]
)
def test_points_lie_where_the_axes_say(curve: list[tuple[int, float]]) -> None:
    svg = chart(moe=curve, empty=[])
    steps, losses = ticks(svg, "middle", "x"), ticks(svg, "end", "y")
    assert len(steps) >= 3 and len(losses) >= 3
    points = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert len(points) == len(curve)
    for (step, loss), (x, y) in zip(curve, points, strict=True):
        for value, place, axis in ((step, x, steps), (loss, y, losses)):
            (low, at_low), *_, (high, at_high) = sorted(axis.items())
            assert low <= value <= high
            assert place == pytest.approx(at_low + (at_high - at_low) * (value - low) / (high - low), abs=0.2)
    assert ">step</text>" in svg and ">validation loss (nats per token)</text>" in svg and ">moe</text>" in svg
    assert "empty" not in svg


def test_a_single_point_has_axes_and_nothing_has_no_chart() -> None:
    assert ">4." in chart(moe=[(100, 4.5)]) and chart(moe=[], dense=[]) == ""
