"""The assignment problem: who does what so that the total is best (Kuhn 1955; shortest augmenting paths, Jonker and
Volgenant 1987)."""

from __future__ import annotations

import numpy as np


def best_assignment(score: np.ndarray) -> np.ndarray:
    """Returns columns so that the sum of score[columns[j], j] is the largest: `rows[j]` for each column j.

    Args:
        score: [n, n], finite.

    Each column in turn finds its cheapest augmenting path; n^3 operations, of which one n is numpy's.
    """
    n = score.shape[0]
    assert score.shape == (n, n) and np.isfinite(score).all()
    cost = -score.T  # cost[j, i] of giving row i to column j
    price = np.zeros(n)  # dual variable of each row i
    owner = np.full(n, -1)  # the column that holds row i
    for start in range(n):
        distance = cost[start] - price
        came_from = np.full(n, start)
        done = np.zeros(n, dtype=bool)
        while True:
            row = int(np.argmin(np.where(done, np.inf, distance)))
            length = distance[row]
            done[row] = True
            if owner[row] < 0:
                break
            column = owner[row]
            # Slack of going on from `row` through the column that holds it.
            through = length + (cost[column] - price) - (cost[column, row] - price[row])
            better = ~done & (through < distance)
            distance[better], came_from[better] = through[better], column
        price[done] += distance[done] - length
        _augment(owner, came_from, row, start)
    rows = np.empty(n, dtype=np.int64)
    rows[owner] = np.arange(n)
    return rows


def _augment(owner: np.ndarray, came_from: np.ndarray, row: int, start: int) -> None:
    """Gives each row of the path to the column before it; the path ends in the free `row` and begins at `start`."""
    while True:
        column = int(came_from[row])
        previous = np.flatnonzero(owner == column)
        owner[row] = column
        if column == start:
            return
        row = int(previous[0])
