"""The warning where coefficients have turned a layer's experts off."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.training.hooks import default_hooks
from megatron_samoe.training.hooks.coefficient_watch import CoefficientWatch
from tests.harness.tiny import tiny_config

EVEN = torch.ones(3, 2, 1, 2)


def told(caplog: pytest.LogCaptureFixture, watch: CoefficientWatch, iteration: int, a_L2GP: Tensor) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="megatron_samoe"):
        watch.look(iteration, a_L2GP)
    return list(dict.fromkeys(record.getMessage() for record in caplog.records))


def test_layers_that_turn_off_are_named_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_samoe"), "propagate", True)
    watch = CoefficientWatch(tiny_config("samoe").moe)
    off = EVEN.clone()
    off[1, 1] = 0.04
    off[2, 0, 0, 1] = 0.0  # one bank of two is no layer turned off
    assert not told(caplog, watch, 10, EVEN)
    (message,) = told(caplog, watch, 20, off)
    assert "MoE layers 1 (w2: 0.057)" in message and "iteration 20" in message and "--samoe-normalization l2" in message
    assert not told(caplog, watch, 30, off)
    assert not told(caplog, watch, 40, EVEN)
    assert len(told(caplog, watch, 50, off)) == 1


def test_layers_without_coefficients_are_not_off(caplog: pytest.LogCaptureFixture) -> None:
    watch, some = CoefficientWatch(tiny_config("samoe").moe), EVEN.clone()
    some[0] = 0  # a layer with experts of its own
    watch.look(10, some)
    assert not watch.is_off


@pytest.mark.parametrize(
    ("layout", "options", "is_watched"),
    [
        ("samoe", {"samoe_normalization": "none"}, True),
        ("samoe", {"samoe_normalization": "none", "samoe_freeze_coefficients": True}, False),
        ("samoe", {"samoe_normalization": "l2"}, False),
        ("moe", {}, False),
        ("moe", {"expert_sharing": "scaled", "num_expert_sets": 2}, True),
        ("moe", {"expert_sharing": "scaled:combined,0,0,combined", "samoe_normalization": "l2"}, True),
        ("moe", {"expert_sharing": "combined,0,0,combined", "samoe_normalization": "l2"}, False),
        ("dense", {}, False),
    ],
)
def test_coefficients_that_can_vanish_are_watched(layout: str, options: dict[str, Any], is_watched: bool) -> None:
    hooks = default_hooks(tiny_config(layout, **options))
    assert any(isinstance(hook, CoefficientWatch) for hook in hooks) == is_watched
