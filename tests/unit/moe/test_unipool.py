"""A pool that all layers choose from (UniPool), against a plain model written from the paper's formulas; routers as well."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_samoe.config import PretrainConfig
from megatron_samoe.models.attention import AttentionInputs
from megatron_samoe.models.rank_model import RankModel
from megatron_samoe.moe.router import Router
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.ops.topk_gate import limit_to_groups
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import compute_gradients, train_step
from tests.harness.tiny import VOCAB_SIZE, global_batch, micro_batches, tiny_config

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
    setup = build_setup(config, VOCAB_SIZE, single_process_state(), torch.float64)
    state = replace(initial_state(setup), iteration=steps_done)
    compute_gradients(setup, state, micro_batches(setup, 0))
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
    setup = build_setup(config, VOCAB_SIZE, single_process_state(), torch.float64)
    counts_LE = torch.eye(4) * 100
    balanced = setup.model.balanced_counts(counts_LE)
    assert all(counts_E.tolist() == [25.0] * 4 for counts_E in balanced)
    layered = build_setup(tiny_config("moe"), VOCAB_SIZE, single_process_state()).model.balanced_counts(counts_LE)
    assert [counts_E.tolist() for counts_E in layered] == counts_LE.tolist()


def test_biases_follow_the_loads_of_a_step_and_do_not_weigh() -> None:
    biases = {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.25}
    config = tiny_config("moe", moe_router_topk=2, moe_router_score_function="sigmoid", **biases)
    setup = build_setup(config, VOCAB_SIZE, single_process_state(), torch.float64)
    state = initial_state(setup)
    result, state = train_step(setup, state, micro_batches(setup, 0))
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


def test_experts_come_from_the_best_groups() -> None:
    key_TE = torch.tensor([[0.9, 0.0, 0.5, 0.6, 0.1, 0.2, 0.8, 0.0]])
    # Best two of each pair: 0.9, 1.1, 0.3, 0.8; of the best one: 0.9, 0.6, 0.2, 0.8.
    assert limit_to_groups(key_TE, 4, 2, 2).isfinite().tolist() == [[True] * 4 + [False] * 4]
    assert limit_to_groups(key_TE, 4, 2, 1).isfinite().tolist() == [[True] * 2 + [False] * 4 + [True] * 2]


def test_the_loss_of_positive_logits_grows_until_experts_are_few() -> None:
    config = tiny_config(
        "moe",
        moe_router_topk=1,
        num_experts=8,
        moe_router_score_function="relu",
        moe_aux_loss_coeff=1e-3,
        lr=5e-3,
        train_iters=60,
    )
    setup = build_setup(config, VOCAB_SIZE, single_process_state())
    state, weight = initial_state(setup), 1.0
    visited = []
    for step in range(40):
        result, state = train_step(setup, state, micro_batches(setup, step))
        assert result.routing is not None
        visited.append(result.routing.counts_LE.sum().item() / (4 * setup.tokens_after(0)))
        weight *= 1.2 if visited[-1] > 1 else 1 / 1.2
        for layer in setup.model.moe_layers():
            assert layer.moe.router.loss_weight.item() == pytest.approx(weight, rel=1e-5)
    assert visited[0] > 3 and min(visited) < 1.5
