"""Load entropy, and the warnings of routers that stay collapsed and of coefficients that have turned a layer's experts off."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_samoe.training.hooks import default_hooks
from megatron_samoe.training.hooks.coefficient_watch import CoefficientWatch
from megatron_samoe.training.hooks.router_watch import PATIENCE_STEPS, RouterWatch
from megatron_samoe.training.router_health import RouterHealth, load_entropy
from tests.harness.tables import table
from tests.harness.tiny import tiny_config

TABLE = table(__file__)

EVEN, ONE = [25.0] * 4, [100.0, 0.0, 0.0, 0.0]
#: Coefficients of three layers' matrices, equal for both banks.
BOTH = torch.ones(3, 2, 1, 2)
Told = Callable[..., list[str]]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Told:
    """What a watch warns of when it looks at a value at the steps from one to another."""
    monkeypatch.setattr(logging.getLogger("megatron_samoe"), "propagate", True)

    def look(watch: Callable[[int, Any], None], value: Any, first: int, last: int | None = None) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="megatron_samoe"):
            for iteration in range(first, (last or first) + 1):
                watch(iteration, value)
        # The logger may have other handlers from tests before, which give a record twice; its message names the iteration.
        return list(dict.fromkeys(record.getMessage() for record in caplog.records))

    return look


def health(*rows: list[float]) -> RouterHealth:
    return RouterHealth.of([torch.tensor(row, dtype=torch.float64) for row in rows], num_tokens=100, num_dropped=0)


def test_shares_are_of_tokens_and_idle_experts_of_all_layers() -> None:
    # 100 tokens of 2 choices each.
    counts = [torch.tensor(row) for row in ([50.0] * 4, [90.0, 110.0, 0.0, 0.0], [50.0, 50.0])]
    found = RouterHealth.of(counts, num_tokens=110, num_dropped=30)
    assert found.largest_expert_share == 1.0 and found.idle_experts == 2
    assert found.dropped_fraction == pytest.approx(30 / 500)
    assert load_entropy(torch.tensor([7.0])) == 1.0, "a single expert is evenly loaded"


def test_a_layer_that_stays_collapsed_after_warm_up_is_warned_of_once(told: Told) -> None:
    watch = RouterWatch(tiny_config("moe", lr_warmup_iters=5, moe_aux_loss_coeff=0.01)).step
    assert not told(watch, health(EVEN, ONE), 1, 4 + PATIENCE_STEPS)
    (message,) = told(watch, health(EVEN, ONE), 5 + PATIENCE_STEPS, 34 + PATIENCE_STEPS)
    assert "MoE layers 1 (0.00)" in message and f"{PATIENCE_STEPS} steps" in message
    for advice in ("--moe-aux-loss-coeff (now 0.01)", "--moe-router-topk 2", "--moe-z-loss-coeff", "--lr"):
        assert advice in message
    assert not told(watch, health(EVEN, EVEN), 100, 109)
    assert len(told(watch, health(ONE, EVEN), 200, 199 + PATIENCE_STEPS)) == 1


def test_short_collapses_are_not_warned_of(told: Told) -> None:
    watch = RouterWatch(tiny_config("moe")).step
    for first in (1, 101):
        assert not told(watch, health(ONE), first, first + PATIENCE_STEPS - 2)
        assert not told(watch, health(EVEN), first + PATIENCE_STEPS)


def test_layers_that_turn_off_are_named_once(told: Told) -> None:
    watch = CoefficientWatch(tiny_config("samoe").moe).look
    off = BOTH.clone()
    off[1, 1] = 0.04
    off[2, 0, 0, 1] = 0.0  # one bank of two is no layer turned off
    assert not told(watch, BOTH, 10)
    (message,) = told(watch, off, 20)
    assert "MoE layers 1 (w2: 0.057)" in message and "iteration 20" in message and "--samoe-normalization l2" in message
    assert not told(watch, off, 30)
    assert not told(watch, BOTH, 40)
    assert len(told(watch, off, 50)) == 1
    off[1] = 0  # a layer with experts of its own
    watch = CoefficientWatch(tiny_config("samoe").moe).look
    assert not told(watch, off, 10)


@pytest.mark.parametrize(("layout", "options", "is_watched"), TABLE["watched"])
def test_coefficients_that_can_vanish_are_watched(layout: str, options: dict[str, Any], is_watched: bool) -> None:
    hooks = default_hooks(tiny_config(layout, **options))
    assert any(isinstance(hook, CoefficientWatch) for hook in hooks) == is_watched
