"""Routing against formulas and slow loops: weights, jitter, capacity, auxiliary losses, and the order in which rows reach experts."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megatron_samoe.config import MoEConfig
from megatron_samoe.moe.alltoall_dispatcher import expert_major_order
from megatron_samoe.moe.balance import AuxiliaryLosses, balance_sum, entropy_sum
from megatron_samoe.moe.capacity import drop_over_capacity, expert_capacity
from megatron_samoe.moe.experts import ExpertShape
from megatron_samoe.moe.router import Router, Routing
from megatron_samoe.moe.types import ForwardContext, MoELayerSpec
from megatron_samoe.ops.topk_gate import GateResult
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.tensor_parallel.random import SampleRandom

B, S, H, E = 3, 8, 6, 5
T = B * S
QUIET = MoEConfig(expert_layout="moe", num_experts=E, moe_router_topk=1, moe_aux_loss_coeff=0.0)
EVALUATION = ForwardContext(batch_size=B)


def training_context(**options: Any) -> ForwardContext:
    return ForwardContext(batch_size=B, training=True, random=SampleRandom(1, 2, tuple(range(B))), **options)


def make_router(config: MoEConfig, dtype: torch.dtype = torch.float64) -> Router:
    state = single_process_state()
    spec = MoELayerSpec(3, 1, ExpertShape(E, H, 4, "gelu", bias=False), 1.0)
    router = Router(config, spec, AuxiliaryLosses(config, state.dp), state, dtype)
    nn.init.normal_(router.weight, std=1.0, generator=torch.Generator().manual_seed(0))
    return router


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(T, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("pre_softmax", [None, True, False])
def test_weights_equal_the_formula(topk: int, function: Any, pre_softmax: bool | None) -> None:
    config = replace(
        QUIET, moe_router_topk=topk, moe_router_score_function=function, moe_router_pre_softmax=pre_softmax
    )
    router, x = make_router(config), inputs()
    routing = router(x, EVALUATION)
    switch = topk == 1 if pre_softmax is None else pre_softmax
    for t in range(T):
        logits = [float(router.weight.detach()[e] @ x[t]) for e in range(E)]
        chosen = sorted(range(E), key=lambda e: -logits[e])[:topk]
        assert routing.ids_TK[t].tolist() == chosen
        scores = [1 / (1 + math.exp(-z)) if function == "sigmoid" else math.exp(z) for z in logits]
        if function == "softmax" or not switch:
            total = sum(scores[e] for e in (range(E) if switch else chosen))
            scores = [score / total for score in scores]
        assert routing.probs_TK[t].tolist() == pytest.approx([scores[e] for e in chosen], rel=1e-9)
    if not switch:
        torch.testing.assert_close(routing.probs_TK.sum(1), torch.ones(T, dtype=torch.float64))


def test_router_works_in_fp32_whatever_its_input() -> None:
    router = make_router(QUIET, torch.bfloat16)
    assert router.weight.dtype == torch.float32
    routing = router(inputs().bfloat16(), EVALUATION)
    assert routing.probs_TK.dtype == torch.float32
    expected = router(inputs().bfloat16().float(), EVALUATION)
    assert torch.equal(routing.probs_TK, expected.probs_TK)


def test_jitter_multiplies_inputs_by_noise_of_their_sample_while_training() -> None:
    config = replace(QUIET, moe_input_jitter_eps=0.3, moe_router_topk=2)
    router, x = make_router(config), inputs()
    context = training_context()
    routing = router(x, context)
    assert context.random is not None
    noise = context.random.uniform((S, H), x.device, 3, "jitter").double()
    factors = 0.7 + 0.6 * noise
    assert factors.min() < 0.75 and factors.max() > 1.25
    expected = make_router(replace(config, moe_input_jitter_eps=0.0))((x * factors.float().double()), EVALUATION)
    torch.testing.assert_close(routing.probs_TK, expected.probs_TK, rtol=1e-5, atol=1e-6)
    assert torch.equal(
        router(x, EVALUATION).probs_TK, make_router(replace(config, moe_input_jitter_eps=0.0))(x, EVALUATION).probs_TK
    )


def drop_slowly(ids: list[list[int]], probs: list[list[float]], capacity: int, policy: str) -> list[list[int]]:
    """Returns ids with -1 for dropped slots, as a careful reader of the documentation would do it."""
    tokens, topk = len(ids), len(ids[0])
    kept = [row[:] for row in ids]
    for sequence in range(B):
        mine = range(sequence * tokens // B, (sequence + 1) * tokens // B)
        for expert in range(E):
            slots = [(k, t) for k in range(topk) for t in mine if ids[t][k] == expert]
            if policy == "probs":
                slots.sort(key=lambda slot: -probs[slot[1]][slot[0]])
            for k, t in slots[capacity:]:
                kept[t][k] = -1
    return kept


@settings(deadline=None, max_examples=80)
@given(st.data(), st.sampled_from(["probs", "position"]), st.integers(1, 6), st.integers(1, 3))
def test_capacity_drops_what_a_slow_loop_drops(data: st.DataObject, policy: Any, capacity: int, topk: int) -> None:
    # A router may choose fewer than K experts for a token.
    ids = [data.draw(st.permutations([*range(E), -1, -1]))[:topk] for _ in range(T)]
    # Ties are frequent, so the order of equally probable tokens is tested too.
    probs = [[data.draw(st.sampled_from([0.1, 0.25, 0.5])) for _ in range(topk)] for _ in range(T)]
    result = drop_over_capacity(torch.tensor(ids), torch.tensor(probs), capacity, B, E, policy)
    assert result.tolist() == drop_slowly([list(row) for row in ids], probs, capacity, policy)


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 4), (1.3, 5), (0.01, 1), (2.0, 7), (10.0, 32)])
def test_capacity_is_rounded_up_and_at_least_one(factor: float, expected: int) -> None:
    assert expert_capacity(S * 2, E, factor) == expected


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_only_training_drops(policy: Any) -> None:
    config = replace(QUIET, moe_expert_capacity_factor=0.5, moe_token_drop_policy=policy, moe_router_topk=2)
    router = make_router(config)
    free, limited = router(inputs(), EVALUATION), router(inputs(), training_context())
    assert int(free.stats.sums["dropped"]) == 0 and (free.ids_TK >= 0).all()
    dropped = limited.ids_TK < 0
    assert int(limited.stats.sums["dropped"]) == dropped.sum() > 0
    assert torch.equal(limited.ids_TK[~dropped], free.ids_TK[~dropped])
    assert torch.equal(limited.stats.sums["counts"], free.stats.sums["counts"]), "loads are counted before dropping"
    capacity = expert_capacity(S * 2, E, 0.5)
    assert limited.ids_TK.tolist() == drop_slowly(free.ids_TK.tolist(), free.probs_TK.tolist(), capacity, policy)


def distribution(router: Router, x: Tensor) -> Tensor:
    logits = x @ router.weight.T
    if router.config.moe_router_score_function == "softmax":
        return logits.softmax(1)
    scores = logits.sigmoid()
    return scores / scores.sum(1, keepdim=True)


def gradient_of_auxiliary_loss(router: Router, x: Tensor, context: ForwardContext) -> tuple[Tensor, Routing]:
    routing = router(x, context)
    assert routing.auxiliary_loss is not None
    (gradient,) = torch.autograd.grad(routing.auxiliary_loss, router.weight)
    return gradient, routing


def expected_balance(router: Router, x: Tensor, ids_TK: Tensor, group: int) -> Tensor:
    """The sum over groups of sequences of group * E * sum_e f_e s_e, written as a loop."""
    scores, total = distribution(router, x).view(B, S, E), torch.zeros((), dtype=torch.float64)
    for first in range(0, B, group):
        chosen = ids_TK.view(B, -1)[first : first + group].flatten()
        load = torch.bincount(chosen, minlength=E) / chosen.numel()
        total = total + group * E * (load * scores[first : first + group].flatten(0, 1).mean(0)).sum()
    return total


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind, group", [("seq_aux_loss", None), ("aux_loss", None), ("aux_loss", 1), ("aux_loss", B)])
def test_balance_loss_over_groups_of_sequences(kind: Any, group: int | None, function: Any) -> None:
    balance = {"moe_router_load_balancing_type": kind, "moe_aux_loss_group_size": group, "moe_aux_loss_coeff": 0.3}
    config = replace(QUIET, moe_router_topk=2, moe_router_score_function=function, **balance)
    router, x = make_router(config), inputs()
    gradient, routing = gradient_of_auxiliary_loss(router, x, training_context(tokens_per_step=4 * T))
    balance = expected_balance(router, x, routing.ids_TK, group or 1)
    # A step of 4 such micro-batches has 4 B sequences, over which the balance is averaged.
    expected = 0.3 * balance / (4 * B)
    torch.testing.assert_close(routing.auxiliary_loss, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(routing.stats.sums["balance"], balance.detach(), rtol=1e-6, atol=1e-9)
    (wanted,) = torch.autograd.grad(expected, router.weight)
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 5), st.data())
def test_groups_that_lie_on_several_ranks_count_all_their_sequences(
    batch: int, ranks: int, data: st.DataObject
) -> None:
    group = data.draw(st.sampled_from([n for n in range(1, batch * ranks + 1) if batch * ranks % n == 0]))
    counts_BE = torch.randint(0, 9, (ranks * batch, E), generator=torch.Generator().manual_seed(batch))
    gates = []
    for own_BE in counts_BE.split(batch):
        scores_BE = torch.rand(batch, E, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        ids_TK = torch.zeros(batch * S, 1, dtype=torch.int64)
        gates.append(GateResult(torch.zeros(batch * S, 1), ids_TK, own_BE, scores_BE, torch.zeros(())))
    sums_GE = counts_BE.view(-1, group, E).sum(1)
    for rank, gate in enumerate(gates):
        # A stand-in for the collective that all ranks enter with their own rows.
        dp = SimpleNamespace(rank=rank, size=ranks, all_reduce=lambda t: t.copy_(counts_BE))
        shares_BE = torch.stack([sums_GE[(rank * batch + b) // group] for b in range(batch)]).double() / (group * S)
        expected = (shares_BE.double() * gate.score_sum_GE).sum() * E / S
        torch.testing.assert_close(balance_sum(gate, gate.ids_TK.shape[1], group, dp), expected, rtol=1e-12, atol=0)


def test_an_entropy_has_the_gradient_of_its_formula_where_its_group_lies_on_several_ranks() -> None:
    scores_BE = torch.rand(8, E, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    share_GE = scores_BE.view(2, 4, E).sum(1) / scores_BE.view(2, 4, E).sum((1, 2))[:, None]
    losses_G = (torch.distributions.Categorical(share_GE).entropy() - math.log(3)).square()
    (wanted,) = torch.autograd.grad(4 * losses_G.sum(), scores_BE)
    for rank, own_BE in enumerate(scores_BE.detach().split(2)):
        own_BE = own_BE.clone().requires_grad_()
        dp = SimpleNamespace(rank=rank, size=4, all_reduce=lambda t: t.copy_(scores_BE.detach()))
        found = entropy_sum(own_BE, 3.0, 4, dp)
        torch.testing.assert_close(found, 2 * losses_G[rank // 2], rtol=1e-12, atol=0)
        (gradient,) = torch.autograd.grad(found, own_BE)
        torch.testing.assert_close(gradient, wanted[2 * rank : 2 * rank + 2], rtol=1e-12, atol=1e-14)


def test_losses_of_two_kinds_add_up_and_none_costs_nothing() -> None:
    context = training_context(tokens_per_step=T)
    balance, z_loss = {"moe_aux_loss_coeff": 0.5}, {"moe_z_loss_coeff": 0.1}
    single = [
        make_router(replace(QUIET, **options))(inputs(), context).auxiliary_loss
        for options in (balance, z_loss, balance | z_loss)
    ]
    assert all(loss is not None for loss in single)
    torch.testing.assert_close(single[0] + single[1], single[2])
    z_T = (inputs() @ make_router(QUIET).weight.T).logsumexp(1)
    torch.testing.assert_close(single[1], 0.1 * z_T.square().mean(), rtol=1e-9, atol=1e-9)
    assert make_router(QUIET)(inputs(), context).auxiliary_loss is None
    off = replace(QUIET, moe_aux_loss_coeff=0.5, moe_router_load_balancing_type="none")
    assert make_router(off)(inputs(), context).auxiliary_loss is None
    assert make_router(replace(QUIET, moe_aux_loss_coeff=0.5))(inputs(), EVALUATION).auxiliary_loss is None


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_expert_major_order_sorts_arrivals_by_expert_then_sender(world: int, e: int, data: st.DataObject) -> None:
    counts = [[data.draw(st.integers(0, 4)) for _ in range(e)] for _ in range(world)]
    arrivals = [
        (expert, sender, i) for sender in range(world) for expert in range(e) for i in range(counts[sender][expert])
    ]
    order = expert_major_order(torch.tensor(counts), len(arrivals))
    assert [arrivals[i] for i in order.tolist()] == sorted(arrivals)
