"""Runs that were not trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.evaluation.run_summary import RunSummary
from megatron_samoe.planning.accounting import ParameterCount


def run_of(loss: float, train: tuple[float, ...] = (4.0, 3.0), entropy: float = 0.9) -> RunSummary:
    """Returns a run of two logged steps, 300 and 400."""
    routing = {"least_load_entropy": entropy, "largest_expert_share": 0.25}
    records: list[dict[str, Any]] = [
        {"iteration": 300 + 100 * i, "lm_loss": value, **routing, "idle_experts": i} for i, value in enumerate(train)
    ]
    records[-1] |= {"validation_loss": loss, "test_loss": loss + 1}
    count = ParameterCount(total=1_234_567, active=543_210, expert=1_000_000)
    return RunSummary("", PretrainConfig(), count, records, 0, None, Path(), 0)
