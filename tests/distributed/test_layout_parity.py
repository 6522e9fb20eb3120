"""Every layout trains the model of one process: losses, norms, gradients and updated weights.

By day the cells of `tests/harness/covering.py`; at night every model of the table in every layout, in both precisions.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from megatron_samoe.tensor_parallel import cross_entropy
from tests.harness.covering import AXES, Cell, all_pairs, is_legal_cell, kept_cells, options_of, pairs_of, simple_cells
from tests.harness.layout_training import LAYOUTS, MODELS, assert_same, is_legal, options_in, train, train_each
from tests.harness.ranks import RankFailure, run_ranks
from tests.harness.tiny import tiny_config

pytestmark = pytest.mark.distributed

#: A model's options, fit to be a key.
Options = tuple[tuple[str, Any], ...]

RTOL = {torch.float32: 1e-5, torch.float64: 1e-11}
#: Steps of training: by day the second one leaves weights that moments made; at night a third one meets them.
BY_DAY_STEPS, NIGHT_STEPS = 2, 3
BY_DAY = kept_cells()
#: In double precision every third model of the day once, in layouts that differ.
CELLS = [[cell for cell in BY_DAY if cell.values == model] for model in dict.fromkeys(cell.values for cell in BY_DAY)]
IN_DOUBLE = [cells[i % len(cells)] for i, cells in enumerate(CELLS) if i % 3 == 0]
SPREAD = [layout for layout in LAYOUTS if layout != "one process"]
AT_NIGHT = [(layout, model) for layout in SPREAD for model in MODELS if is_legal(layout, MODELS[model])]
#: Eight ranks, by day: what has most to do with each other.
EIGHT = "tp2 pp2 ep2 sp zero overlap"
MODELS_OF_EIGHT = ("moe top2 llama", "samoe step", "tied", "muon samoe")


@cache
def _outcome(
    layout: str, dtype: torch.dtype, models: tuple[Options, ...], steps: int
) -> dict[Options, Any] | RankFailure:
    configs = [options_in(layout, dict(model)) for model in models]
    try:
        results = run_ranks(train_each, LAYOUTS[layout][0], configs, dtype, steps, timeout_s=900)[0]
    except RankFailure as failure:
        return failure  # kept as well, or each model's test would run into it anew
    return dict(zip(models, results, strict=True))


def result_of(
    layout: str, dtype: torch.dtype, model: Options, together: tuple[Options, ...], steps: int
) -> dict[str, Any]:
    """Returns the training of a model, made with those that the same processes train."""
    outcome = _outcome(layout, dtype, together, steps)
    if isinstance(outcome, RankFailure):
        raise outcome
    return outcome[model]


def check(
    layout: str,
    dtype: torch.dtype,
    model: Options,
    here: tuple[Options, ...],
    everywhere: tuple[Options, ...],
    steps: int = BY_DAY_STEPS,
) -> None:
    """Compares a model's training in a layout with that in one process.

    Args:
        here: models that are trained in the layout.
        everywhere: models that are trained in any.
    """
    expected = result_of("one process", dtype, model, everywhere, steps)
    assert_same(result_of(layout, dtype, model, here, steps), expected, RTOL[dtype])


def hashable(options: dict[str, Any]) -> Options:
    return tuple(options.items())


def of_cells(cells: list[Cell], layout: str | None = None) -> tuple[Options, ...]:
    """Returns the models of a list of cells, or those in one layout."""
    found = (hashable(options_of(cell)) for cell in cells if layout in (None, cell.layout))
    return tuple(dict.fromkeys(found))


@pytest.mark.parametrize("cell", BY_DAY, ids=str)
def test_layout_equals_one_process(cell: Cell) -> None:
    here = of_cells(BY_DAY, cell.layout)
    check(cell.layout, torch.float32, hashable(options_of(cell)), here, of_cells(BY_DAY))


@pytest.mark.parametrize("cell", IN_DOUBLE, ids=str)
def test_layout_equals_one_process_in_double_precision(cell: Cell) -> None:
    here = of_cells(IN_DOUBLE, cell.layout)
    check(cell.layout, torch.float64, hashable(options_of(cell)), here, of_cells(IN_DOUBLE))


@pytest.mark.parametrize("model", MODELS_OF_EIGHT)
def test_eight_ranks_equal_one_process(model: str) -> None:
    models = tuple(hashable(MODELS[name]) for name in MODELS_OF_EIGHT)
    check(EIGHT, torch.float32, hashable(MODELS[model]), models, models)


def test_a_loss_without_kept_logits_trains_as_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process. Layouts train "sinks and cap" without them."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 1000)  # some ten tokens
    for model in ("samoe step", "sinks and cap"):  # whose output matrix is tied to the embedding's, and is not
        options = {**MODELS[model], "init_method_std": 0.2, "logits_scaling": 2.5}
        kept, fused = (
            train(tiny_config(**options | {"fused_linear_cross_entropy": fused}), steps=3) for fused in (False, True)
        )
        assert_same(fused, kept, rtol=1e-5)


@pytest.mark.night
@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize(("layout", "model"), AT_NIGHT)
def test_every_model_in_every_layout(layout: str, model: str, dtype: torch.dtype) -> None:
    here = tuple(hashable(MODELS[m]) for name, m in AT_NIGHT if name == layout)
    check(layout, dtype, hashable(MODELS[model]), here, tuple(map(hashable, MODELS.values())), NIGHT_STEPS)


def test_every_axis_meets_every_value_by_day() -> None:
    """What no layout can train is missing with every other choice left plain."""
    missing = all_pairs().difference(*map(pairs_of, BY_DAY))
    for cell in (cell for layout in AXES for cell in simple_cells(layout)):
        found = pairs_of(cell) & missing
        assert not found or not is_legal_cell(cell), (
            f"no training of the day has {found}: run python -m tests.harness.covering"
        )
    assert all(map(is_legal_cell, BY_DAY))
