"""Experts that layers may choose from: how they grow with neighbours, and how a pool's lock divides them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.moe.candidates import NeighbourSchedule, PoolLock, candidate_schedule, owners, spread
from megatron_samoe.ops.topk_gate import ChoiceRule, gate_by_rule, limited, topk_gate
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.training.checkpointing import find_run, load_run, save_run
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import train_step
from tests.harness.tiny import VOCAB_SIZE, micro_batches, tiny_config

LOCKED: dict[str, Any] = {"layout": "moe", "expert_sharing": "pool", "num_experts": 16, "moe_router_topk": 2}
LOCKED |= {"pool_lock_step": 2, "pool_lock_anneal_steps": 2}


def test_neighbours_open_after_a_layers_own() -> None:
    config = MoEConfig("moe", "neighbours", num_experts=2, num_neighbour_layers=3, neighbour_unmask_steps=4)
    schedule = NeighbourSchedule(config)
    factors_E = schedule.start(1, 6)
    assert factors_E.tolist() == [0, 0, 1, 1, 0, 0]
    opened = []
    for iteration in range(1, 6):
        schedule.update({1: factors_E}, torch.zeros(3, 6), iteration, single_process_state())
        opened.append("".join(str(int(f)) for f in factors_E))
    assert opened == ["001110", "001111", "101111", "111111", "111111"]
    assert schedule.start(4, 6).tolist() == [0, 0, 1, 1, 0, 0], "the second layer of the second block"
    assert candidate_schedule(MoEConfig("moe", "neighbours", num_experts=2)) is None


def test_neighbours_are_drawn_anew_until_all_are_open() -> None:
    """N + floor((r - 1) N (t - s) / (e - s)) of r N experts in step t, between the steps s and e: ReXMoE's equation 6."""
    drawn = {"neighbour_unmask_steps": 8, "neighbour_unmask_start": 3, "neighbour_unmask_order": "random"}
    config = MoEConfig("moe", "neighbours", num_experts=4, num_neighbour_layers=2, **drawn)
    schedule = NeighbourSchedule(config)
    factors_E = {layer: schedule.start(layer, 8) for layer in range(2)}
    opened = {0: [factors_E[0].clone()], 1: [factors_E[1].clone()]}
    for iteration in range(1, 14):
        schedule.update(factors_E, torch.zeros(2, 8), iteration, single_process_state())
        for layer, factors in factors_E.items():
            opened[layer].append(factors.clone())
    wanted = [4 + 4 * min(max(t - 3, 0), 8) // 8 for t in range(14)]
    for layer in range(2):
        assert [int(factors.sum()) for factors in opened[layer]] == wanted
        assert sum(not torch.equal(a, b) for a, b in itertools.pairwise(opened[layer][:4])) >= 2
    assert any(not torch.equal(a, b) for a, b in zip(opened[0], opened[1], strict=True)), "layers draw apart"
    schedule.update(factors_E, torch.zeros(2, 8), 1, single_process_state())
    assert all(factors.all() for factors in factors_E.values()), "steps that count anew close nothing"


def test_owners_keep_as_many_choices_as_can_be_kept() -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(5):
        counts_LE = torch.randint(0, 50, (3, 6), generator=generator).double()
        best = max(
            sum(counts_LE[layer, e].item() for e, layer in enumerate(owner))
            for owner in set(itertools.permutations([0, 0, 1, 1, 2, 2]))
        )
        owner_E = owners(counts_LE)
        assert sorted(owner_E.tolist()) == [0, 0, 1, 1, 2, 2]
        assert counts_LE[owner_E, torch.arange(6)].sum().item() == best


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_places_spread_every_layer_over_expert_parallel_ranks(ep: int) -> None:
    owner_E = torch.randperm(12, generator=torch.Generator().manual_seed(7)).remainder(3)
    order_E = spread(owner_E)
    assert sorted(order_E.tolist()) == list(range(12))
    assert owner_E[order_E].tolist() == [0, 1, 2] * 4
    for rank in owner_E[order_E].chunk(ep):
        assert rank.bincount(minlength=3).tolist() == [4 // ep] * 3


@pytest.mark.parametrize("score_function", ["softmax", "norm"])
def test_a_lock_is_decided_once_and_annealed(score_function: Any) -> None:
    setup = build_setup(
        tiny_config(**LOCKED, moe_router_score_function=score_function), VOCAB_SIZE, single_process_state()
    )
    state, seen, counts = initial_state(setup), [], []
    for step in range(5):
        result, state = train_step(setup, state, micro_batches(setup, step))
        assert result.routing is not None
        counts.append(result.routing.counts_LE)
        seen.append(torch.stack([layer.moe.router.candidates for layer in setup.model.moe_layers()]).clone())
    assert (seen[0] == 1).all()
    owned_LE = torch.arange(16) % 4 == torch.arange(4)[:, None]  # where they were moved to
    before_LE = owners(counts[1]) == torch.arange(4)[:, None]
    assert counts[1][before_LE].sum() > counts[1][owned_LE].sum(), "as good as they lay"
    for factors_LE, others in zip(seen[1:], (0.5, 0.0, 0.0, 0.0), strict=True):
        assert torch.equal(factors_LE, torch.where(owned_LE, 1.0, others))
    assert (counts[-1][~owned_LE] == 0).all(), "a closed expert is not chosen"
    assert (counts[1][~before_LE] > 0).any()


def test_steps_vote_for_owners_also_across_a_checkpoint(tmp_path: Path) -> None:
    """Three steps vote, of which a run that is interrupted has saved two."""
    voted = {**LOCKED, "pool_lock_step": 4, "pool_lock_vote_steps": 3, "pool_lock_entropy_coeff": 0.1}
    config = tiny_config(**voted, lr=0.03, save=str(tmp_path), load=str(tmp_path))
    whole = build_setup(config, VOCAB_SIZE, single_process_state())
    state, counts = initial_state(whole), []
    for step in range(6):
        result, state = train_step(whole, state, micro_batches(whole, step))
        assert result.routing is not None
        counts.append(result.routing.counts_LE.double())
        if step == 2:
            save_run(whole, state)
        if step == 3:
            mean_LE = sum(c / c.sum(1, keepdim=True) for c in counts[1:]) / 3
            order_E = spread(owners(mean_LE))
            assert not torch.equal(order_E, spread(owners(counts[3]))), "the last step alone would decide otherwise"
            assert state.expert_fractions_LE is not None
            torch.testing.assert_close(state.expert_fractions_LE, mean_LE[:, order_E].float())
    resumed = build_setup(config, VOCAB_SIZE, single_process_state())
    found = find_run(resumed)
    assert found is not None
    state = load_run(resumed, initial_state(resumed), found)
    for step in range(3, 6):
        _, state = train_step(resumed, state, micro_batches(resumed, step))
    for name, weight in whole.model.global_parameters().items():
        assert torch.equal(resumed.model.global_parameters()[name], weight), name


def test_a_closed_expert_is_as_if_it_did_not_exist() -> None:
    torch.manual_seed(1)
    logits_TE = torch.randn(64, 6, requires_grad=True)
    factors_E = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    open_E = factors_E > 0
    alone_TE = logits_TE.detach()[:, open_E].requires_grad_()
    for score_function, pre_softmax in (("softmax", False), ("softmax", True), ("sigmoid", False)):
        gate = topk_gate(limited(logits_TE, factors_E, multiplies=False), 2, score_function, pre_softmax)
        alone = topk_gate(alone_TE, 2, score_function, pre_softmax)
        assert torch.equal(gate.ids_TK, open_E.nonzero()[:, 0][alone.ids_TK])
        torch.testing.assert_close(gate.probs_TK, alone.probs_TK)
        torch.testing.assert_close(gate.z_sum, alone.z_sum)
        weights_TK = torch.randn(64, 2)
        (got,) = torch.autograd.grad((gate.probs_TK * weights_TK).sum() + gate.z_sum, logits_TE)
        (wanted,) = torch.autograd.grad((alone.probs_TK * weights_TK).sum() + alone.z_sum, alone_TE)
        torch.testing.assert_close(got[:, open_E], wanted)
        assert (got[:, ~open_E] == 0).all()


def test_scores_fall_in_proportion() -> None:
    logits_TE, factors_E = torch.randn(3, 4), torch.tensor([1.0, 0.5, 0.25, 1.0])
    torch.testing.assert_close(limited(logits_TE, factors_E, multiplies=False).exp(), logits_TE.exp() * factors_E)
    torch.testing.assert_close(limited(logits_TE, factors_E, multiplies=True).relu(), logits_TE.relu() * factors_E)


def test_a_run_from_trained_weights_takes_no_decision_back() -> None:
    """Its steps count from 0 again, as with --finetune."""
    lock = PoolLock(MoEConfig("moe", "pool", num_experts=4, pool_lock_step=2, pool_lock_anneal_steps=2))
    factors = {0: torch.tensor([1.0, 0.0, 0.0, 1.0]), 1: torch.tensor([0.0, 1.0, 1.0, 0.0])}
    for iteration in range(1, 5):
        lock.update(
            factors, torch.tensor([[0.0, 9.0, 9.0, 0.0], [9.0, 0.0, 0.0, 9.0]]), iteration, single_process_state()
        )
        assert factors[0].tolist() == [1, 0, 0, 1] and factors[1].tolist() == [0, 1, 1, 0]
    schedule = NeighbourSchedule(MoEConfig("moe", "neighbours", num_experts=2, neighbour_unmask_steps=4))
    opened = torch.ones(4)
    schedule.update({0: opened}, torch.zeros(2, 4), 1, single_process_state())
    assert opened.tolist() == [1, 1, 1, 1]


def test_biases_of_closed_experts_wait() -> None:
    neighbours = {"expert_sharing": "neighbours", "num_experts": 2, "neighbour_unmask_steps": 10}
    biases = {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.5}
    config = tiny_config("moe", moe_router_topk=1, **neighbours, **biases)
    setup = build_setup(config, VOCAB_SIZE, single_process_state())
    router = setup.model.moe_layers()[0].moe.router
    router.after_step(torch.tensor([30.0, 10.0, 0.0, 0.0]), torch.tensor(1.0))
    assert router.expert_bias.tolist() == [-0.5, 0.5, 0.0, 0.0]


def test_a_bias_gives_no_place_to_an_expert_without_a_score() -> None:
    """It would count as idle, and its bias rise for ever."""
    logits_TE = torch.tensor([[0.5, -0.1, 0.2, -0.3]])
    gate = gate_by_rule(logits_TE, ChoiceRule(2, "norm", bias_E=torch.tensor([0.0, 9.0, 0.0, 9.0])))
    assert gate.ids_TK.tolist() == [[0, 2]] and gate.counts_GE.tolist() == [[1, 0, 1, 0]]
