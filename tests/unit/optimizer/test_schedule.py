"""Learning rates by hand, where they are not those of Megatron's scheduler (tests/parity/test_megatron_schedules.py)."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_samoe.config import OptimizerConfig
from megatron_samoe.optimizer.schedule import learning_rate


def rates(train_iters: int, iterations: list[int], **options: Any) -> list[float]:
    config = OptimizerConfig(lr=1.0, min_lr=0.2, **options)
    return [learning_rate(config, train_iters, i) for i in iterations]


def test_warm_up_is_linear_and_ends_at_the_highest_rate() -> None:
    assert rates(100, [0, 1, 3], lr_warmup_iters=4) == pytest.approx([0.25, 0.5, 1.0])
    assert rates(100, [4], lr_warmup_iters=4) == pytest.approx([1.0])
    assert rates(100, [0, 9, 10], lr_warmup_fraction=0.1, lr_decay_style="constant") == pytest.approx([0.1, 1.0, 1.0])


def test_lengths_that_are_not_given() -> None:
    assert rates(100, [89, 90, 95], lr_decay_style="WSD") == pytest.approx([1.0, 1.0, 0.6]), "a tenth of the steps"
    assert rates(100, [99, 100], lr_decay_style="linear") == pytest.approx([0.208, 0.2]), "to the last step"
