"""Copies of the pool that drift apart are noticed and named."""

from __future__ import annotations

import pytest
import torch

from megatron_samoe.errors import ReplicaDriftError
from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.training.hooks.replica_check import check_pool_replicas
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import train_step
from tests.harness.ranks import run_ranks
from tests.harness.tiny import VOCAB_SIZE, micro_batches, tiny_config, with_layout

pytestmark = pytest.mark.distributed


def drift(damaged_rank: int | None) -> str | None:
    """Returns the error after a step, if any, with one element of a rank's bank changed."""
    config = with_layout(tiny_config("samoe", samoe_pool_placement="replicated"), pp=2)
    setup = build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel))
    train_step(setup, initial_state(setup), micro_batches(setup, 0))
    if setup.parallel.rank == damaged_rank:
        with torch.no_grad():
            setup.model.expert_pool["combined"].bank["w2"].view(-1)[7] += 1e-6
    try:
        check_pool_replicas(setup, iteration=1)
    except ReplicaDriftError as error:
        return str(error)
    return None


def test_equal_copies_pass() -> None:
    assert run_ranks(drift, 4, None) == [None] * 4


def test_a_copy_that_differs_is_named_by_its_holders() -> None:
    reports = run_ranks(drift, 4, 3)
    # Ranks 1 and 3 hold the copies of one data-parallel rank, 0 and 2 those of the other, all of the same pool.
    assert any(reports)
    assert all("w2 differ" in report and "[3]" in report for report in reports if report)
