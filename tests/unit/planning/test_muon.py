"""What the planner says of Muon, against matrices counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_samoe.optimizer.muon import newton_schulz_flops
from megatron_samoe.planning.description import PlannedModel
from megatron_samoe.planning.layout_cost import Cluster, step_cost
from megatron_samoe.planning.muon import flops_of_rank, matrices_of
from tests.harness.tiny import VOCAB_SIZE, tiny_config, with_layout, with_options

CLUSTER = Cluster(4, 4, 1e11, 1e15, 4e11, 5e10)


def test_a_newton_schulz_step_is_three_products() -> None:
    # X X^T of [a, b], its square, and its product with X.
    assert newton_schulz_flops(3, 5, 2) == newton_schulz_flops(5, 3, 2) == 2 * 2 * (3 * 3 * 5 + 3**3 + 3 * 3 * 5)


def test_flops_of_a_dense_model() -> None:
    config = tiny_config("dense", optimizer="muon")
    planned = PlannedModel(config, VOCAB_SIZE, 1)
    # qkv is planned as one matrix [96, 32]; output [32, 32]; two of the MLP, 128 wide.
    layer = sum(newton_schulz_flops(*s, 5) for s in ((96, 32), (32, 32), (128, 32), (32, 128)))
    assert flops_of_rank(matrices_of(planned, 0), config.optimizer, planned.grid, 0) == pytest.approx(4 * layer)


@pytest.mark.parametrize("model", ["dense", "moe", "samoe"])
def test_ranks_share_the_work(model: str) -> None:
    config = tiny_config(model, optimizer="muon")
    alone = PlannedModel(config, VOCAB_SIZE, 1)
    whole = flops_of_rank(matrices_of(alone, 0), config.optimizer, alone.grid, 0)
    for layout in ({"zero": True}, {"tp": 2}, {"tp": 2, "sp": True, "zero": True}):
        spread = PlannedModel(with_layout(config, **layout), VOCAB_SIZE, 4)
        shares = [flops_of_rank(matrices_of(spread, rank), config.optimizer, spread.grid, rank) for rank in range(4)]
        assert sum(shares) == pytest.approx(whole), layout


def test_owners_beyond_the_number_of_matrices_do_nothing() -> None:
    config = tiny_config("dense", optimizer="muon")
    few = [PlannedModel(with_layout(config, zero=True), VOCAB_SIZE, ranks) for ranks in (4, 8)]
    # Each of the four layers has one matrix of a kind.
    one_each, too_many = (flops_of_rank(matrices_of(p, 0), config.optimizer, p.grid, 0) for p in few)
    assert too_many == one_each


def test_a_step_takes_longer_and_bf16_products_less() -> None:
    config = with_layout(tiny_config("samoe"), tp=2, zero=True)
    costs = [
        step_cost(with_options(config, **o), VOCAB_SIZE, CLUSTER).seconds.get("muon", 0.0)
        for o in ({}, {"optimizer": "muon"}, {"optimizer": "muon", "muon_ns_dtype": "bf16"})
    ]
    assert costs[0] == 0.0 < costs[2] < costs[1]
    measured_in_fp32 = replace(CLUSTER, fp32_share=1.0)
    fp32 = step_cost(with_options(config, optimizer="muon"), VOCAB_SIZE, measured_in_fp32).seconds["muon"]
    assert fp32 == pytest.approx(costs[2])


def test_directions_travel_in_fp32() -> None:
    """Of two ranks each makes half of them and gets the other half; with slices a quarter of all goes to its owner, and a quarter back."""
    config = tiny_config("dense", optimizer="muon")
    whole_bytes = 4 * sum(m.numel for m in matrices_of(PlannedModel(config, VOCAB_SIZE, 1), 0))
    for zero in (False, True):
        cost = step_cost(with_layout(config, zero=zero), VOCAB_SIZE, Cluster(2, 2, 1e11, 1e15, 4e11, 5e10))
        assert cost.sent_bytes["muon"] == pytest.approx(whole_bytes / 2)
