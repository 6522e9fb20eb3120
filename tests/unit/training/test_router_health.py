"""Load entropy and the warning of routers that stay collapsed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from megatron_samoe.training.hooks.router_watch import PATIENCE_STEPS, RouterWatch
from megatron_samoe.training.router_health import RouterHealth, load_entropy
from tests.harness.tiny import tiny_config

EVEN, ONE = [25.0] * 4, [100.0, 0.0, 0.0, 0.0]


def health(*rows: list[float]) -> RouterHealth:
    return RouterHealth.of([torch.tensor(row, dtype=torch.float64) for row in rows], num_tokens=100, num_dropped=0)


def test_entropy_is_one_for_even_loads_and_zero_for_one_expert() -> None:
    found = [load_entropy(torch.tensor(row)) for row in (EVEN, ONE, [50.0, 50.0, 0.0, 0.0])]
    assert found == pytest.approx([1.0, 0.0, 0.5])
    assert load_entropy(torch.tensor([7.0])) == 1.0, "a single expert is evenly loaded"


def test_shares_are_of_tokens_and_idle_experts_of_all_layers() -> None:
    # 100 tokens of 2 choices each.
    counts = [torch.tensor(row) for row in ([50.0] * 4, [90.0, 110.0, 0.0, 0.0], [50.0, 50.0])]
    found = RouterHealth.of(counts, num_tokens=110, num_dropped=30)
    assert found.largest_expert_share == 1.0 and found.idle_experts == 2
    assert found.dropped_fraction == pytest.approx(30 / 500)


def warnings_of(caplog: pytest.LogCaptureFixture, watch: RouterWatch, steps: int, first: int, value: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="megatron_samoe"):
        for iteration in range(first, first + steps):
            watch.step(iteration, value)
    # The logger may have other handlers from tests before, which give a record twice; its message names the iteration.
    return list(dict.fromkeys(record.getMessage() for record in caplog.records))


def test_a_layer_that_stays_collapsed_after_warm_up_is_warned_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_samoe"), "propagate", True)
    watch = RouterWatch(tiny_config("moe", lr_warmup_iters=5, moe_aux_loss_coeff=0.01))
    assert not warnings_of(caplog, watch, 5 + PATIENCE_STEPS - 1, 1, health(EVEN, ONE))
    (message,) = warnings_of(caplog, watch, 30, 5 + PATIENCE_STEPS, health(EVEN, ONE))
    assert "MoE layers 1 (0.00)" in message and f"{PATIENCE_STEPS} steps" in message
    for advice in ("--moe-aux-loss-coeff (now 0.01)", "--moe-router-topk 2", "--moe-z-loss-coeff", "--lr"):
        assert advice in message
    assert not warnings_of(caplog, watch, 10, 100, health(EVEN, EVEN))
    assert len(warnings_of(caplog, watch, PATIENCE_STEPS, 200, health(ONE, EVEN))) == 1


def test_short_collapses_are_not_warned_of(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_samoe"), "propagate", True)
    watch = RouterWatch(tiny_config("moe"))
    for first in (1, 101):
        assert not warnings_of(caplog, watch, PATIENCE_STEPS - 1, first, health(ONE))
        assert not warnings_of(caplog, watch, 1, first + PATIENCE_STEPS, health(EVEN))
