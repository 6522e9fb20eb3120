"""Routers on real text: loads even out within the first steps and stay even; with loads of the step before they swing.

A tiny model on bytes of a novel, with the program's defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_samoe.config import ModelConfig, MoEConfig, OptimizerConfig, PretrainConfig, TrainingConfig
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.training.router_health import RouterHealth
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import train_step
from tests.harness.pairs import first_by_day

NOVEL = Path(__file__).resolve().parents[3] / "megatron_samoe/cli/quickstart_data/austen_emma_mansfield.txt"
LAYERS, LENGTH, BATCH, STEPS, SETTLED = 3, 64, 16, 120, 100


def batches() -> list[dict[str, Tensor]]:
    text = torch.from_numpy(np.frombuffer(NOVEL.read_bytes()[:600_000], dtype=np.uint8).astype(np.int64))
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(STEPS):
        starts = torch.randint(0, len(text) - LENGTH - 1, (BATCH,), generator=generator)
        rows = torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()])
        found.append({"tokens": rows[:, :-1], "labels": rows[:, 1:], "loss_mask": torch.ones(BATCH, LENGTH)})
    return found


def healths(layout: Any, **moe: Any) -> list[RouterHealth]:
    """Trains, and returns the routers' health of every step."""
    config = PretrainConfig(
        model=ModelConfig(num_layers=LAYERS, hidden_size=64, num_attention_heads=4, seq_length=LENGTH),
        moe=MoEConfig(expert_layout=layout, **moe),
        training=TrainingConfig(micro_batch_size=BATCH, global_batch_size=BATCH, train_iters=4 * STEPS),
        optimizer=OptimizerConfig(lr=2e-3, min_lr=2e-4, lr_warmup_iters=50),
    )
    setup = build_setup(config, 256, single_process_state())
    state, found = initial_state(setup), []
    for batch in batches():
        result, state = train_step(setup, state, [batch])
        assert result.routing is not None
        found.append(result.routing.health)
    return found


def faults(found: list[RouterHealth], topk: int) -> list[str]:
    """Says where loads are not as even as they must be."""
    most = 0.6 if topk == 1 else 0.8
    said = [
        f"step {n}: entropy {h.least_load_entropy:.2f}"
        for n, h in enumerate(found, 1)
        if h.least_load_entropy < (0.85 if n > SETTLED else 0.5 if n > 20 else 0.0)
    ]
    settled = sum(h.least_load_entropy for h in found[SETTLED:]) / (STEPS - SETTLED)
    if settled < 0.9:
        said.append(f"mean entropy after step {SETTLED}: {settled:.2f}")
    return said + [
        f"step {n}: share {h.largest_expert_share:.2f}"
        for n, h in enumerate(found, 1)
        if n > 20 and h.largest_expert_share > most
    ]


@pytest.mark.parametrize(("layout", "topk"), first_by_day([("samoe", 2), ("moe", 1), ("moe", 2), ("samoe", 1)]))
def test_loads_even_out_and_stay_even(layout: str, topk: int) -> None:
    assert not faults(healths(layout, moe_router_topk=topk), topk)
