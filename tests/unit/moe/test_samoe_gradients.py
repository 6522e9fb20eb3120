"""The pool's gradients against plain autograd, and the special cases in which a pool is something known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
from megatron_samoe.optimizer.mixed_precision import MixedPrecisionOptimizer
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.training.evaluate import evaluate
from megatron_samoe.training.setup import TrainSetup, build_setup, initial_state
from megatron_samoe.training.train_step import compute_gradients, train_step
from tests.harness.tiny import VOCAB_SIZE, micro_batches, tiny_config

L, P, E, H, FFN, STEPS = 3, 2, 4, 6, 10, 4
STATE = single_process_state()
SWIGLU, GELU = "swiglu", "gelu"


def normalized(raw: Tensor, kind: str) -> Tensor:
    if kind == "softmax":
        return raw.exp() / raw.exp().sum(-1, keepdim=True)
    return raw / raw.square().sum(-1, keepdim=True).sqrt() if kind == "l2" else raw


def twin_experts(weights: dict[str, Tensor], layer: int, x_RH: Tensor, rows: Sequence[int], activation: str) -> Tensor:
    """Returns what a layer's experts make of their rows, in operations that autograd knows."""
    results = []
    for e, x in enumerate(x_RH.split(list(rows))):
        bias = weights.get("b1")
        if activation == SWIGLU:
            gate, up = (x @ weights["w1"][layer, e, i].T + (0 if bias is None else bias[layer, e, i]) for i in (0, 1))
            a = gate * torch.sigmoid(gate) * up
        else:
            h = x @ weights["w1"][layer, e].T + (0 if bias is None else bias[layer, e])
            a = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        y = a @ weights["w2"][layer, e].T
        results.append(y if bias is None else y + weights["b2"][layer, e])
    return torch.cat(results)


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
            twin_y = twin_y + twin_experts(weights, layer, twin_y, rows, activation)
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


def setup_of(**options: Any) -> TrainSetup:
    dtype = options.pop("dtype", torch.float64)
    return build_setup(tiny_config(**options), VOCAB_SIZE, STATE, dtype)


def copy_shared_weights(source: TrainSetup, target: TrainSetup) -> None:
    """Copies all parameters of the same name, and banks 0, 1, ... to the experts of MoE layers 0, 1, ..."""
    theirs = source.model.global_parameters()
    with torch.no_grad():
        for name, p in target.model.global_parameters().items():
            if name in theirs:
                p.copy_(theirs[name])
        pool = source.model.expert_pool and source.model.expert_pool["combined"]
        assert pool is not None
        for layer in target.model.moe_layers():
            bank = layer.moe.moe_index % source.config.moe.num_expert_banks
            for name, p in layer.moe.experts.named_parameters():
                p.copy_(pool.bank[name][bank])


@pytest.mark.parametrize("combine", ["step", "layer"])
@pytest.mark.parametrize("style", ["gpt3", "llama"])
def test_as_many_banks_as_layers_with_identity_coefficients_is_the_standard_moe(combine: str, style: str) -> None:
    common = {"style": style, "clip_grad": 0.0, "dtype": torch.float32, "moe_router_topk": 2, "lr": 1e-2}
    samoe = setup_of(
        layout="samoe", num_expert_banks=4, samoe_combine=combine, samoe_freeze_coefficients=True, **common
    )
    standard = setup_of(layout="moe", **common)
    copy_shared_weights(samoe, standard)
    states = [initial_state(samoe), initial_state(standard)]
    assert samoe.model.expert_pool is not None
    pool = samoe.model.expert_pool["combined"].bank
    before = {name: bank.detach().clone() for name, bank in pool.items()}
    for step in range(4):
        results = []
        for i, setup in enumerate((samoe, standard)):
            result, states[i] = train_step(setup, states[i], micro_batches(setup, step))
            results.append(result)
        assert results[0].lm_loss == pytest.approx(results[1].lm_loss, rel=1e-6 if combine == "layer" else 0, abs=0)
        assert results[0].routing is not None and results[1].routing is not None
        assert torch.equal(results[0].routing.counts_LE, results[1].routing.counts_LE)
    # A product added to a sum is not, on every CPU, the bits of the same product made on its own and then added.
    tolerance = 1e-5 if combine == "layer" else 0.0
    own = standard.model.global_parameters()
    for name, bank in pool.items():
        for layer in range(4):
            expert = own[f"layers.{layer}.moe.experts.{name}"]
            torch.testing.assert_close(
                bank[layer], expert, rtol=tolerance, atol=tolerance, msg=lambda m, at=(layer, name): f"bank {at}: {m}"
            )
        assert not torch.equal(bank, before[name]), "both have learned something"


def test_identity_coefficients_that_learn_give_the_experts_the_standard_moes_gradients() -> None:
    samoe, standard = setup_of(layout="samoe", num_expert_banks=4), setup_of(layout="moe")
    copy_shared_weights(samoe, standard)
    for setup in (samoe, standard):
        compute_gradients(setup, initial_state(setup), micro_batches(setup, 0))
    own = standard.model.global_parameters()
    for name, p in samoe.model.global_parameters().items():
        if name.startswith("expert_pool."):
            for layer in range(4):
                expected = own[f"layers.{layer}.moe.experts.{name.rpartition('.')[2]}"].main_grad
                torch.testing.assert_close(p.main_grad[layer], expected, rtol=1e-12, atol=1e-15)
        elif name in own:
            torch.testing.assert_close(p.main_grad, own[name].main_grad, rtol=1e-12, atol=1e-15)
        else:
            assert p.main_grad.abs().max() > 0, f"{name} learns"


@pytest.mark.parametrize("combine", ["step", "layer"])
def test_one_hot_coefficients_are_hard_sharing(combine: str) -> None:
    common: dict[str, Any] = {"num_layers": 4, "clip_grad": 0.0, "lr": 1e-2}
    samoe = setup_of(
        layout="samoe", num_expert_banks=2, samoe_combine=combine, samoe_freeze_coefficients=True, **common
    )
    shared = setup_of(layout="moe", **common)
    layers = shared.model.moe_layers()
    layers[2].moe.experts, layers[3].moe.experts = layers[0].moe.experts, layers[1].moe.experts
    shared.model.lend_for(None)  # lends the layers what they own now
    buffers = GradBuffers(shared.model.global_parameters(), STATE)
    shared = replace(shared, buffers=buffers, optimizer=MixedPrecisionOptimizer(buffers, shared.config.optimizer))
    copy_shared_weights(samoe, shared)
    states = [initial_state(samoe), initial_state(shared)]
    for step in range(3):
        results = []
        for i, setup in enumerate((samoe, shared)):
            result, states[i] = train_step(setup, states[i], micro_batches(setup, step))
            results.append(result.lm_loss)
        assert results[0] == results[1] if step == 0 else abs(results[0] - results[1]) < 1e-11
    assert samoe.model.expert_pool is not None
    for name, bank in samoe.model.expert_pool["combined"].bank.items():
        for i in (0, 1):
            expected = getattr(layers[i].moe.experts, name)
            torch.testing.assert_close(bank[i], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("combine", ["step", "layer"])
def test_frozen_coefficients_never_change_and_others_do(combine: str, frozen: bool) -> None:
    setup = setup_of(layout="samoe", samoe_combine=combine, samoe_freeze_coefficients=frozen, lr=1e-2)
    coefficients = {n: p for n, p in setup.model.global_parameters().items() if n.endswith("moe.combination")}
    banks = {n: p for n, p in setup.model.global_parameters().items() if n.startswith("expert_pool.")}
    assert len(coefficients) == 4 and len(banks) == 4
    before = {n: p.detach().clone() for n, p in (coefficients | banks).items()}
    state = initial_state(setup)
    for step in range(3):
        _, state = train_step(setup, state, micro_batches(setup, step))
    for name, p in coefficients.items():
        assert torch.equal(p, before[name]) == frozen
        assert (name in setup.buffers.parameters) != frozen
    for name, p in banks.items():
        assert not torch.equal(p, before[name])


def test_experts_that_no_token_chooses_get_no_gradient() -> None:
    setup = setup_of(layout="moe", moe_aux_loss_coeff=0.0)
    with torch.no_grad():
        for layer in setup.model.moe_layers():
            # With a large constant input channel the last expert loses every token.
            layer.mlp_norm.bias.fill_(0.0)[0] = 100.0
            layer.moe.router.weight[:, 0] = torch.tensor([1.0, 1.0, 1.0, -1.0])
    *_, routing = compute_gradients(setup, initial_state(setup), micro_batches(setup, 0))
    assert routing is not None
    assert torch.equal(routing.counts_LE[:, 3], torch.zeros(4, dtype=torch.float64))
    for layer in setup.model.moe_layers():
        for name, p in layer.moe.experts.named_parameters():
            assert torch.equal(p.main_grad[3], torch.zeros_like(p.main_grad[3])), name
            assert p.main_grad[:3].abs().max() > 0


@pytest.mark.parametrize("layout", ["samoe", "moe"])
def test_gradients_do_not_pile_up_from_step_to_step(layout: str) -> None:
    setup = setup_of(layout=layout)
    gradients = []
    for _ in range(2):
        compute_gradients(setup, initial_state(setup), micro_batches(setup, 0))
        gradients.append({n: p.main_grad.clone() for n, p in setup.buffers.parameters.items()})
    for name, first in gradients[0].items():
        assert torch.equal(first, gradients[1][name]), name


def test_evaluation_between_steps_sees_the_updated_pool() -> None:
    setup = setup_of(layout="samoe", lr=0.05)
    state = initial_state(setup)
    (batch, *_) = micro_batches(setup, 0)

    def loss() -> float:
        return evaluate(setup, [batch]).mean

    before = loss()
    _, state = train_step(setup, state, micro_batches(setup, 0))
    after = loss()
    assert after < before - 0.01
    # A forward pass whose combined weights were stale would still give the loss before the step.
    with torch.no_grad():
        assert setup.model.expert_pool is not None
        setup.model.expert_pool["combined"].bank["w2"].mul_(0.0)
    assert abs(loss() - after) > 1e-6


def test_layer_mode_and_step_mode_agree_in_single_precision_and_bf16() -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        gradients = []
        for combine in ("step", "layer"):
            setup = setup_of(layout="samoe", samoe_combine=combine, samoe_init="uniform", dtype=dtype)
            compute_gradients(setup, initial_state(setup), micro_batches(setup, 0))
            gradients.append({n: p.main_grad.clone() for n, p in setup.buffers.parameters.items()})
        for name, expected in gradients[0].items():
            error = (gradients[1][name] - expected).norm() / expected.norm().clamp_min(1e-12)
            assert error < tolerance, f"{name}: {error}"
