"""The pool's gradients against plain autograd, and what steps do to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_samoe.config import MoEConfig
from megatron_samoe.config.sharing_map import COMBINED, ExpertSource
from megatron_samoe.distributed.grad_buffer import GradBuffers
from megatron_samoe.moe.experts import ExpertShape
from megatron_samoe.moe.sharing.coefficients import Coefficients
from megatron_samoe.moe.sharing.combined import LayerLender, StepLender
from megatron_samoe.moe.sharing.expert_pool import ExpertPool
from megatron_samoe.moe.sharing.way import SharingContext
from megatron_samoe.ops.grouped_mlp import ExpertWeights
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.training.evaluate import evaluate
from tests.harness.op_checks import grouped_mlp_reference
from tests.harness.tiny import micro_batches, started, steps, tiny_config

L, P, E, H, FFN, STEPS = 3, 2, 4, 6, 10, 4
STATE = single_process_state()
SWIGLU, GELU = "swiglu", "gelu"


def normalized(raw: Tensor, kind: str) -> Tensor:
    if kind == "softmax":
        return raw.exp() / raw.exp().sum(-1, keepdim=True)
    return raw / raw.square().sum(-1, keepdim=True).sqrt() if kind == "l2" else raw


def combined(banks: dict[str, Tensor], raw: Sequence[Tensor], kind: str) -> dict[str, Tensor]:
    """Returns W[l, e] = sum_b A[l, b] T[b, e] of every weight."""
    a_L2GP = normalized(torch.stack(list(raw)), kind)
    rows = {"w1": 0, "b1": 0, "w2": 1, "b2": 1}
    return {
        name: torch.einsum("lgp,pg...->lg...", a_L2GP[:, rows[name]].expand(L, E, P), bank)
        for name, bank in banks.items()
    }


@pytest.mark.parametrize("combine", ["step", "layer"])
@pytest.mark.parametrize("normalization", ["none", "l2", "softmax"])
@pytest.mark.parametrize("granularity", ["layer", "expert"])
@pytest.mark.parametrize(("activation", "bias"), [(GELU, True), (SWIGLU, True), (SWIGLU, False), (GELU, False)])
def test_gradients_equal_autograds_over_four_micro_batches(
    combine: Any, normalization: Any, granularity: Any, activation: Any, bias: bool
) -> None:
    ways = {"samoe_combine": combine, "samoe_normalization": normalization, "samoe_granularity": granularity}
    config = MoEConfig(expert_layout="samoe", num_experts=E, num_expert_banks=P, **ways)
    torch.manual_seed(3)
    shape = ExpertShape(E, H, FFN, activation, bias)
    context = SharingContext(
        config, (ExpertSource(COMBINED),) * L, (shape,) * L, (tuple(range(L)),), STATE, torch.float64
    )
    pool = ExpertPool(context, shape, P)
    parts = [Coefficients(config, i, L, E, STATE, torch.float64) for i in range(L)]
    raw = [part.coefficients for part in parts]
    for parameter in raw:
        nn.init.uniform_(parameter, 0.2, 1.2)
    for parameter in pool.bank.values():
        nn.init.normal_(parameter, std=0.5)
    GradBuffers({**dict(pool.bank.items()), **{f"a{i}": a for i, a in enumerate(raw)}}, STATE).zero()
    made = StepLender if combine == "step" else LayerLender
    lender = made(pool, dict(enumerate(parts)), STATE, torch.float64)

    twin_banks = {name: p.detach().clone().requires_grad_() for name, p in pool.bank.items()}
    twin_raw = [a.detach().clone().requires_grad_() for a in raw]
    lender.begin_step()
    # One micro-batch leaves experts without tokens, one layer's experts all of them.
    for rows in ([3, 2, 4, 1], [0, 5, 0, 5], [1, 1, 1, 7], [10, 0, 0, 0]):
        x = torch.randn(sum(rows), H, dtype=torch.float64)
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        y, twin_y = inputs
        weights = combined(twin_banks, twin_raw, normalization)
        for layer in range(L):
            y = y + lender.experts(layer)(y, rows)
            twin = ExpertWeights(**{name: w[layer] for name, w in weights.items()})
            twin_y = twin_y + grouped_mlp_reference(twin_y, rows, twin, activation)
        torch.testing.assert_close(y, twin_y, rtol=1e-11, atol=1e-11)
        dy = torch.randn_like(y)
        y.backward(dy)
        twin_y.backward(dy)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-11, atol=1e-11)
    lender.finish_step()
    for name, parameter in pool.bank.items():
        assert parameter.grad is None
        torch.testing.assert_close(parameter.main_grad, twin_banks[name].grad, rtol=1e-11, atol=1e-11)
    for a, twin in zip(raw, twin_raw, strict=True):
        torch.testing.assert_close(a.main_grad, twin.grad, rtol=1e-11, atol=1e-11)
        assert twin.grad.abs().max() > 1e-3 or normalization == "l2"
    found = [p.main_grad.clone() for p in (*pool.bank.values(), *raw)]
    lender.begin_step()
    lender.finish_step()
    for p, before in zip((*pool.bank.values(), *raw), found, strict=True):
        assert torch.equal(p.main_grad, before), "a step without a micro-batch has nothing left of the one before"


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("combine", ["step", "layer"])
def test_frozen_coefficients_never_change_and_others_do(combine: str, frozen: bool) -> None:
    setup, state = started(tiny_config("samoe", samoe_combine=combine, samoe_freeze_coefficients=frozen, lr=1e-2))
    coefficients = {n: p for n, p in setup.model.global_parameters().items() if n.endswith("moe.combination")}
    banks = {n: p for n, p in setup.model.global_parameters().items() if n.startswith("expert_pool.")}
    assert len(coefficients) == 4 and len(banks) == 4
    before = {n: p.detach().clone() for n, p in (coefficients | banks).items()}
    list(steps(setup, state, 3))
    for name, p in coefficients.items():
        assert torch.equal(p, before[name]) == frozen
        assert (name in setup.buffers.parameters) != frozen
    for name, p in banks.items():
        assert not torch.equal(p, before[name])


def test_evaluation_between_steps_sees_the_updated_pool() -> None:
    setup, state = started(tiny_config("samoe", lr=0.05))
    (batch, *_) = micro_batches(setup, 0)

    def loss() -> float:
        return evaluate(setup, [batch]).mean

    before = loss()
    list(steps(setup, state, 1))
    after = loss()
    assert after < before - 0.01
    # A forward pass whose combined weights were stale would still give the loss before the step.
    with torch.no_grad():
        assert setup.model.expert_pool is not None
        setup.model.expert_pool["combined"].bank["w2"].mul_(0.0)
    assert abs(loss() - after) > 1e-6
