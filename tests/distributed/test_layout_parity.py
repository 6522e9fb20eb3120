"""Every layout trains the model of one process: losses, norms, gradients and updated weights."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.config import PretrainConfig
from tests.harness.layout_training import LAYOUTS, MODELS, assert_same, layout_config, train
from tests.harness.ranks import RankFailure, run_ranks

pytestmark = pytest.mark.distributed

IN_DOUBLE = ("samoe step", "samoe layer", "samoe per expert", "samoe many banks", "samoe many banks per expert",
             "moe balance over ranks", "samoe balance over ranks", "tied", "scaled", "combined middle", "pool", "sets balanced",
             "groups and biases", "neighbours", "pool locked", "relu")  # fmt: skip

# The way of sharing and of routing changes nothing but the experts: the layouts that differ in what those meet. The others
# take many minutes; MEGATRON_SAMOE_LONG_TESTS=1 has them all.
WAYS = tuple(MODELS)[tuple(MODELS).index("tied") :]
LAYOUTS_OF_WAYS = ("tp2 sp etp1 ep2", "ep2 edp2 overlap", "pp2 vpp2 dp1", "pp2 ep2 zero", "pp2 ep2 replicated pool",
                   "tp2 pp2 ep2 sp zero overlap")  # fmt: skip


# Context parallelism meets positions, capacities, balance, noise and recomputation; how experts are shared is nothing to it.
MODELS_OF_CONTEXT = ("moe top2 llama", "samoe noisy", "moe balance over ranks")


def models_of(layout: str) -> tuple[str, ...]:
    """Returns the models that are trained in a layout."""
    if layout == "pp4 ep2":
        return ("pool", "pool locked")
    if layout.startswith("cp") and not os.environ.get("MEGATRON_SAMOE_LONG_TESTS"):
        return MODELS_OF_CONTEXT if LAYOUTS[layout][0] <= 4 else ("samoe step",)
    everything = layout in ("one process", *LAYOUTS_OF_WAYS) or os.environ.get("MEGATRON_SAMOE_LONG_TESTS")
    return tuple(model for model in MODELS if everything or model not in WAYS)


def steps_of(config: PretrainConfig) -> int:
    """Returns three, of which the last meets weights that moments made, or five, in which a schedule of routing ends."""
    return 5 if config.moe.pool_lock_step is not None or config.moe.neighbour_unmask_steps else 3


def train_each(configs: list[PretrainConfig], dtype: torch.dtype) -> list[dict[str, Any]] | None:
    """Trains one model after the other on the same processes; the first rank has the results."""
    results = [train(config, dtype, steps_of(config)) for config in configs]
    return results if not dist.is_initialized() or dist.get_rank() == 0 else None


@cache
def _outcome(layout: str, dtype: torch.dtype, models: tuple[str, ...]) -> dict[str, dict[str, Any]] | RankFailure:
    configs = [layout_config(layout, model) for model in models]
    try:
        results = run_ranks(train_each, LAYOUTS[layout][0], configs, dtype, timeout_s=600)[0]
    except RankFailure as failure:
        return failure  # kept as well, or each model's test would run into it anew
    return dict(zip(models, results, strict=True))


def results_of(layout: str, dtype: torch.dtype, models: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    outcome = _outcome(layout, dtype, models)
    if isinstance(outcome, RankFailure):
        raise outcome
    return outcome


@pytest.mark.parametrize(
    ("layout", "model"),
    [(layout, model) for layout in LAYOUTS if layout != "one process" for model in models_of(layout)],
)
def test_layout_equals_one_process(layout: str, model: str) -> None:
    expected = results_of("one process", torch.float32, models_of("one process"))[model]
    assert_same(results_of(layout, torch.float32, models_of(layout))[model], expected, rtol=1e-5)


@pytest.mark.parametrize("model", IN_DOUBLE)
@pytest.mark.parametrize("layout", ["tp2 etp1 ep4", "pp2 ep2 zero", "tp2 pp2", "cp2 ep4"])
def test_layout_equals_one_process_in_double_precision(layout: str, model: str) -> None:
    expected = results_of("one process", torch.float64, IN_DOUBLE)[model]
    result = results_of(layout, torch.float64, IN_DOUBLE)[model]
    assert_same(result, expected, rtol=1e-11)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, rtol=1e-9, atol=1e-11)
