"""Bytes per rank, planned and held by set-ups of real process groups, folded experts included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_samoe.config import PretrainConfig
from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.planning.memory import rank_memory
from megatron_samoe.training.setup import TrainSetup, build_setup, initial_state
from megatron_samoe.training.train_step import train_step
from tests.harness.kept_bytes import lent_tensors
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks
from tests.harness.tables import table
from tests.harness.tiny import VOCAB_SIZE, micro_batches, tiny_config, with_layout

pytestmark = pytest.mark.distributed
TABLE = table(__file__)

CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = TABLE["cases"]


def tensors_of(setup: TrainSetup) -> dict[str, list[torch.Tensor]]:
    """Returns what a set-up holds between steps, by part."""
    optimizer = setup.optimizer
    moments = [t for name in optimizer.masters for t in optimizer.moments(name).values()]
    own = {p.untyped_storage().data_ptr() for p in setup.model.parameters()}
    own |= {p.main_grad.untyped_storage().data_ptr() for p in setup.buffers.parameters.values()}
    folded = [t for t in lent_tensors(setup.model.lender) if t.untyped_storage().data_ptr() not in own]
    return {
        "weights": [p.detach() for p in setup.model.parameters()],
        "gradients": [p.main_grad for p in setup.buffers.parameters.values()],
        "optimizer": [*moments, *optimizer.own_masters().values()],
        "folded": folded,
    }


def held_bytes(config: PretrainConfig) -> dict[str, int]:
    """Returns the bytes of each part after a step, memory that several tensors share counted once."""
    parallel = initialize_model_parallel(config.parallel)
    setup = build_setup(config, VOCAB_SIZE, parallel)
    result, _ = train_step(setup, initial_state(setup), micro_batches(setup, 0))
    assert result.is_finite
    parts = {}
    for part, tensors in tensors_of(setup).items():
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
        parts[part] = sum(storages.values())
    return parts


@pytest.mark.parametrize("case", first_by_day(CASES, 5))
def test_a_training_rank_holds_what_was_planned(case: str) -> None:
    world_size, model, sizes = CASES[case]
    config = with_layout(tiny_config(**model), **sizes)
    for rank, held in enumerate(run_ranks(held_bytes, world_size, config)):
        planned = rank_memory(config, VOCAB_SIZE, world_size, rank)
        assert held["weights"] == planned.weights, rank
        assert held["gradients"] == pytest.approx(planned.gradients, rel=0.01), rank
        assert held["optimizer"] == planned.optimizer, rank
        assert held["folded"] == planned.folded_weights + planned.folded_gradients, rank
