"""Pools that layers choose from: UniPool against a plain model, and experts that layers may choose."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_samoe.config import PretrainConfig
from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.models.attention import AttentionInputs
from megatron_samoe.models.rank_model import RankModel
from megatron_samoe.moe.candidates import NeighbourSchedule, PoolLock, candidate_schedule, owners, spread
from megatron_samoe.moe.router import Router
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.ops.topk_gate import ChoiceRule, gate_by_rule, limited, topk_gate
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.training.checkpointing import find_run, load_run, save_run
from megatron_samoe.training.train_step import compute_gradients
from tests.harness.tiny import VOCAB_SIZE, global_batch, micro_batches, started, steps, tiny_config

POOL: dict[str, Any] = {"layout": "moe", "expert_sharing": "pool", "num_experts": 8, "moe_aux_loss_coeff": 0.3}
POOL |= {"moe_router_topk": 2, "moe_router_score_function": "norm", "moe_router_init_method_std": 0.3}


def plain_expert(x_TH: Tensor, pool: dict[str, Tensor], e: int) -> Tensor:
    h = F.gelu(x_TH @ pool["w1"][0, e].t() + pool["b1"][0, e], approximate="tanh")
    return h @ pool["w2"][0, e].t() + pool["b2"][0, e]


def plain_loss(model: RankModel, config: PretrainConfig, tokens_BS: Tensor, labels_BS: Tensor, grown: float) -> Tensor:
    """Returns cross-entropy plus coefficient * E * sum_e f_e * sum_l P[l, e], f over all layers, for each sequence; before a lock
    plus coefficient * (H - log(E / L))^2 / L of each layer and group of sequences."""
    stage, moe = model.chunks[0], config.moe
    batch, length = tokens_BS.shape
    pool = {name: model.expert_pool["set"]["0"].bank[name] for name in ("w1", "b1", "w2", "b2")}
    context = ForwardContext(batch_size=batch)
    x = stage.embedding(tokens_BS, torch.arange(length).expand(batch, -1), context)
    used_BE = torch.zeros(batch, 8, dtype=torch.float64)
    scores_BE: Tensor | float = 0.0
    entropy_loss: Tensor | float = 0.0
    layers = list(stage.layers.values())
    for layer in layers:
        x = x + layer.attention(layer.attention_norm(x), AttentionInputs(None, None), context)
        normed = layer.mlp_norm(x)
        logits = normed.double() @ layer.moe.router.weight.t()
        s = layer.moe.router.scale * (logits / logits.norm(dim=1, keepdim=True)).relu()
        chosen = s.topk(2, dim=1).indices
        mask = torch.zeros_like(s).scatter_(1, chosen, 1.0) * (s > 0)
        x = x + sum((s * mask)[:, e : e + 1] * plain_expert(normed, pool, e) for e in range(8))
        used_BE += mask.view(batch, length, 8).sum(1)
        mean_BE = (s / s.sum(1, keepdim=True).clamp_min(1e-20)).view(batch, length, 8).mean(1)
        scores_BE = scores_BE + mean_BE
        group = torch.distributions.Categorical(mean_BE.view(-1, moe.pool_lock_entropy_group_size or 1, 8).mean(1))
        entropy_loss = entropy_loss + (group.entropy() - math.log(8 / len(layers))).square().mean() / len(layers)
    f_BE = used_BE / (length * 2 * len(layers))
    balance = 8 * (f_BE * scores_BE).sum() / batch
    logits = stage.embedding.word.weight[:VOCAB_SIZE]
    ce = F.cross_entropy(stage.final_norm(x) @ logits.t(), labels_BS.flatten())
    return ce + moe.moe_aux_loss_coeff * balance + grown * moe.pool_lock_entropy_coeff * entropy_loss


@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize("steps_done, grown", [(0, 0.0), (1, 0.25), (9, 1.0)])
@pytest.mark.parametrize("group", [None, 4])
def test_a_pool_has_the_gradients_of_a_plain_model(
    recompute: Any, steps_done: int, grown: float, group: int | None
) -> None:
    """The entropy loss has its weight from the step of the lock on."""
    lock = {"pool_lock_step": 4, "pool_lock_anneal_steps": 4}
    lock |= {"pool_lock_entropy_coeff": 0.7, "pool_lock_entropy_group_size": group}
    config = tiny_config(**POOL, **lock, recompute_granularity=recompute, micro_batch_size=4)
    setup, state = started(config, torch.float64)
    compute_gradients(setup, replace(state, iteration=steps_done), micro_batches(setup, 0))
    actual = {p.name: p.grad.clone() for p in setup.buffers.pieces}
    batch = global_batch(config, 0)
    model = setup.model
    loss = plain_loss(model, config, batch["tokens"], batch["labels"], grown)
    trained = {name: p for name, p in model.global_parameters().items() if p.requires_grad}
    names, parameters = zip(*trained.items(), strict=True)
    for name, expected in zip(names, torch.autograd.grad(loss, parameters), strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            actual[name].view_as(expected), expected, rtol=1e-9, atol=1e-11 * max(scale, 1), msg=name
        )
    assert model.global_parameters()["layers.0.moe.router.scale"].item() > 0.5


def test_balance_of_a_pool_lets_layers_prefer_experts() -> None:
    """What is even over all layers needs no push, however uneven each layer is."""
    config = tiny_config(**{**POOL, "moe_aux_loss_coeff": 1.0, "moe_router_topk": 1, "num_experts": 4})
    setup, _ = started(config, torch.float64)
    counts_LE = torch.eye(4) * 100
    balanced = setup.model.balanced_counts(counts_LE)
    assert all(counts_E.tolist() == [25.0] * 4 for counts_E in balanced)
    layered = started(tiny_config("moe"))[0].model.balanced_counts(counts_LE)
    assert [counts_E.tolist() for counts_E in layered] == counts_LE.tolist()


def test_biases_follow_the_loads_of_a_step_and_do_not_weigh() -> None:
    biases = {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.25}
    config = tiny_config("moe", moe_router_topk=2, moe_router_score_function="sigmoid", **biases)
    setup, state = started(config, torch.float64)
    ((result, _),) = steps(setup, state, 1)
    assert result.routing is not None
    for layer, counts_E in zip(setup.model.moe_layers(), result.routing.counts_LE, strict=True):
        expected = 0.25 * (counts_E.mean() - counts_E).sign()
        assert layer.moe.router.expert_bias.tolist() == expected.tolist()
    router: Router = setup.model.moe_layers()[0].moe.router
    logits_TE = torch.randn(16, 4, dtype=torch.float64)
    gate = router.select(logits_TE, 2)
    s = logits_TE.sigmoid()
    expected_ids = (s + router.expert_bias).topk(2, dim=1).indices
    assert torch.equal(gate.ids_TK, expected_ids)
    chosen = s.gather(1, expected_ids)
    torch.testing.assert_close(gate.probs_TK, chosen / chosen.sum(1, keepdim=True))
    assert not torch.equal(expected_ids, s.topk(2, dim=1).indices), "the biases choose otherwise"


def test_the_loss_of_positive_logits_grows_until_experts_are_few() -> None:
    routing = {"moe_router_topk": 1, "moe_router_score_function": "relu", "moe_aux_loss_coeff": 1e-3}
    config = tiny_config("moe", num_experts=8, lr=5e-3, train_iters=60, **routing)
    setup, state = started(config)
    visited, weight = [], 1.0
    for result, _ in steps(setup, state, 40):
        assert result.routing is not None
        visited.append(result.routing.counts_LE.sum().item() / (4 * setup.tokens_after(0)))
        weight *= 1.2 if visited[-1] > 1 else 1 / 1.2
        for layer in setup.model.moe_layers():
            assert layer.moe.router.loss_weight.item() == pytest.approx(weight, rel=1e-5)
    assert visited[0] > 3 and min(visited) < 1.5


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


@pytest.mark.parametrize("score_function", ["softmax", "norm"])
def test_a_lock_is_decided_once_and_annealed(score_function: Any) -> None:
    setup, state = started(tiny_config(**LOCKED, moe_router_score_function=score_function))
    seen, counts = [], []
    for result, _ in steps(setup, state, 5):
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
    (whole, state), counts = started(config), []
    for step, (result, after) in enumerate(steps(whole, state, 6)):
        assert result.routing is not None
        counts.append(result.routing.counts_LE.double())
        if step == 2:
            save_run(whole, after)
        if step == 3:
            mean_LE = sum(c / c.sum(1, keepdim=True) for c in counts[1:]) / 3
            order_E = spread(owners(mean_LE))
            assert not torch.equal(order_E, spread(owners(counts[3]))), "the last step alone would decide otherwise"
            assert after.expert_fractions_LE is not None
            torch.testing.assert_close(after.expert_fractions_LE, mean_LE[:, order_E].float())
    resumed, state = started(config)
    found = find_run(resumed)
    assert found is not None
    list(steps(resumed, load_run(resumed, state, found), 3))
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
    setup, _ = started(config)
    router = setup.model.moe_layers()[0].moe.router
    router.after_step(torch.tensor([30.0, 10.0, 0.0, 0.0]), torch.tensor(1.0))
    assert router.expert_bias.tolist() == [-0.5, 0.5, 0.0, 0.0]


def test_a_bias_gives_no_place_to_an_expert_without_a_score() -> None:
    """It would count as idle, and its bias rise for ever."""
    logits_TE = torch.tensor([[0.5, -0.1, 0.2, -0.3]])
    gate = gate_by_rule(logits_TE, ChoiceRule(2, "norm", bias_E=torch.tensor([0.0, 9.0, 0.0, 9.0])))
    assert gate.ids_TK.tolist() == [[0, 2]] and gate.counts_GE.tolist() == [[1, 0, 1, 0]]
