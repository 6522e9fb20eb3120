"""Cases by pairs of axes: by day so many of a product that each two values of different axes meet, the rest at night."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from itertools import combinations, product
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


def cover(
    candidates: Iterable[T], parts: Callable[[T], Set[Any]], cost: Callable[[T], float] = lambda _: 1.0
) -> list[T]:
    """Returns few candidates that have every part that any has: again and again the one with the most missing parts for its cost."""
    left, chosen = list(candidates), list[T]()
    missing = set().union(*map(parts, left))
    while missing:
        chosen.append(max(left, key=lambda candidate: len(parts(candidate) & missing) / cost(candidate)))
        missing -= parts(chosen[-1])
    return chosen


def by_pairs(*axes: Iterable[Any]) -> list[Any]:
    """Returns the parameters of every case of a product; those that bring no new pair together are marked for the night.

    With one or two axes nothing is left for the night: a case is a pair.
    """
    values = [list(axis) for axis in axes]
    # Values need not be hashable: places stand for them.
    cases = list(product(*(range(len(axis)) for axis in values)))
    by_day = set(cover(cases, _pairs))
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
