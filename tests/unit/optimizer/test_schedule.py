"""Learning rates by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_samoe.config import OptimizerConfig
from megatron_samoe.optimizer.schedule import learning_rate


def rates(train_iters: int, iterations: list[int], **options: Any) -> list[float]:
    config = OptimizerConfig(lr=1.0, min_lr=0.2, **options)
    return [learning_rate(config, train_iters, i) for i in iterations]


def test_warm_up_is_linear_and_ends_at_the_highest_rate() -> None:
    assert rates(100, [0, 1, 3], lr_warmup_iters=4) == pytest.approx([0.25, 0.5, 1.0])
    assert rates(100, [4], lr_warmup_iters=4) == pytest.approx([1.0])
    assert rates(100, [0, 9, 10], lr_warmup_fraction=0.1, lr_decay_style="constant") == pytest.approx([0.1, 1.0, 1.0])


def test_cosine() -> None:
    half = 0.2 + 0.8 * 0.5
    assert rates(100, [0, 50, 100, 1000]) == pytest.approx([1.0, half, 0.2, 0.2])
    assert rates(100, [25])[0] == pytest.approx(0.2 + 0.4 * (1 + math.sqrt(0.5)))
    assert rates(110, [10, 60, 110], lr_warmup_iters=10) == pytest.approx([1.0, half, 0.2])


def test_linear() -> None:
    assert rates(100, [0, 25, 75, 100], lr_decay_style="linear") == pytest.approx([1.0, 0.8, 0.4, 0.2])
    assert rates(500, [50, 100, 499], lr_decay_style="linear", lr_decay_iters=100) == pytest.approx([0.6, 0.2, 0.2])


def test_constant_does_not_decay() -> None:
    assert rates(100, [0, 99, 5000], lr_decay_style="constant") == [1.0, 1.0, 1.0]


def test_wsd_is_constant_then_linear() -> None:
    options: dict[str, Any] = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 20, "lr_warmup_iters": 10}
    assert rates(100, [5, 10, 80, 90, 99, 100], **options) == pytest.approx([0.6, 1.0, 1.0, 0.6, 0.24, 0.2])
    assert rates(100, [89, 90, 95], lr_decay_style="WSD") == pytest.approx([1.0, 1.0, 0.6]), "a tenth if not given"


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(["cosine", "linear", "constant", "WSD"]), st.integers(1, 200), st.integers(0, 50),
    st.none() | st.integers(1, 300),
)  # fmt: skip
def test_every_schedule_rises_then_falls_within_its_bounds(
    style: Any, iters: int, warmup: int, decay: int | None
) -> None:
    config = OptimizerConfig(
        lr=1e-3, min_lr=1e-5, lr_decay_style=style, lr_decay_iters=decay, lr_warmup_iters=min(warmup, decay or iters)
    )
    values = [learning_rate(config, iters, i) for i in range(iters + 5)]
    assert all(0 < v <= 1e-3 * (1 + 1e-12) for v in values)
    rising = values[: config.lr_warmup_iters]
    falling = values[config.lr_warmup_iters :]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert all(v >= 1e-5 * (1 - 1e-12) for v in falling)
    last = max(decay or iters, config.lr_warmup_iters)
    if style != "constant" and last < len(values):
        assert values[last] == pytest.approx(1e-5)
