"""Cases by pairs of axes: by day so many of a product that each two values of different axes meet, the rest at night."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest


def by_pairs(*axes: Iterable[Any]) -> list[Any]:
    """Returns the parameters of every case of a product; those that bring no new pair together are marked for the night.

    With one or two axes nothing is left for the night: a case is a pair.
    """
    values = [list(axis) for axis in axes]
    # Values need not be hashable: places stand for them.
    cases = list(product(*(range(len(axis)) for axis in values)))
    missing = {pair for case in cases for pair in _pairs(case)}
    by_day = set[tuple[int, ...]]()
    while missing:
        best = max(cases, key=lambda case: len(_pairs(case) & missing))
        by_day.add(best)
        missing -= _pairs(best)
    return [
        pytest.param(
            *(axis[i] for axis, i in zip(values, case, strict=True)),
            marks=() if case in by_day or len(values) < 3 else pytest.mark.night,
        )
        for case in cases
    ]


def _pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(combinations(enumerate(case), 2))


def first_by_day(cases: Iterable[Any], number: int = 1) -> list[Any]:
    """Returns the parameters of cases; all but the first ones are marked for the night."""
    return [
        pytest.param(*case if isinstance(case, tuple) else [case], marks=() if i < number else pytest.mark.night)
        for i, case in enumerate(cases)
    ]
