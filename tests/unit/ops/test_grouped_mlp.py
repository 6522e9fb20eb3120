"""Expert MLPs over sorted rows against plain autograd: outputs and all gradients, over odd sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_samoe.ops.grouped_mlp import ExpertWeights, grouped_mlp


def make_weights(E: int, F: int, H: int, activation: str, bias: bool, dtype: torch.dtype) -> ExpertWeights:
    up = (2, F) if activation == "swiglu" else (F,)

    def new(*shape: int) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) * 0.4).to(dtype).requires_grad_()

    return ExpertWeights(new(E, *up, H), new(E, H, F), new(E, *up) if bias else None, new(E, H) if bias else None)


def twin(x_RH: Tensor, rows: list[int], w: ExpertWeights, activation: str) -> Tensor:
    """Returns the same in double precision, expert by expert, from operations that autograd knows."""
    parts = []
    for e, x in enumerate(x_RH.split(rows)):
        if activation == "swiglu":
            gate, up = (x @ w.w1[e, i].T + (0 if w.b1 is None else w.b1[e, i]) for i in (0, 1))
            a = gate * torch.sigmoid(gate) * up
        else:
            h = x @ w.w1[e].T + (0 if w.b1 is None else w.b1[e])
            a = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        y = a @ w.w2[e].T
        parts.append(y if w.b2 is None else y + w.b2[e])
    return torch.cat(parts)


def compare(
    rows: list[int], F: int, H: int, activation: Any, bias: bool, dtype: torch.dtype, tolerance: float, main_grads: bool
) -> None:
    weights = make_weights(len(rows), F, H, activation, bias, dtype)
    x = torch.randn(sum(rows), H, dtype=torch.float64).to(dtype).requires_grad_()
    dy = torch.randn(sum(rows), H, dtype=torch.float64).to(dtype)
    exact = weights.map(lambda t: t.detach().double().requires_grad_())
    exact_x = x.detach().double().requires_grad_()
    expected = twin(exact_x, rows, exact, activation)
    expected.backward(dy.double())

    grads = None
    repeats = 1
    if main_grads:
        wide = torch.promote_types(dtype, torch.float32)
        grads, repeats = weights.map(lambda t: torch.ones_like(t, dtype=wide, requires_grad=False)), 2
    for _ in range(repeats):
        x.grad = None
        y = grouped_mlp(x, rows, weights, activation, grads)
        assert y.dtype == dtype
        y.backward(dy)

    def check(name: str, actual: Tensor, wanted: Tensor) -> None:
        scale = max(1.0, float(wanted.detach().abs().max())) if wanted.numel() else 1.0
        torch.testing.assert_close(
            actual.double(), wanted.detach(), rtol=tolerance, atol=tolerance * scale, msg=lambda m: f"{name}: {m}"
        )

    check("y", y, expected)
    check("dx", x.grad, exact_x.grad)
    for name, weight in weights.items():
        gradient = getattr(exact, name).grad
        if grads is None:
            check(name, weight.grad, gradient)
        else:
            assert weight.grad is None, "autograd gets no second gradient"
            check(name, getattr(grads, name), 1 + repeats * gradient)


CASES = [([3, 5, 2], 7, 4), ([0, 6, 0, 1], 8, 5), ([0, 0], 3, 2), ([1], 1, 1), ([17, 0, 33], 16, 24)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5), (torch.bfloat16, 4e-2)], ids=str
)
@pytest.mark.parametrize("main_grads", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(("rows", "F", "H"), CASES)
def test_output_and_gradients_equal_autograds(
    rows: list[int], F: int, H: int, activation: str, bias: bool, main_grads: bool, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    compare(rows, F, H, activation, bias, dtype, tolerance, main_grads)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 9), st.integers(1, 9),
    st.sampled_from(["gelu", "swiglu"]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_shape(rows: list[int], F: int, H: int, activation: str, bias: bool, main_grads: bool) -> None:
    torch.manual_seed(1)
    compare(rows, F, H, activation, bias, torch.float64, 1e-11, main_grads)


def test_main_gradients_are_filled_even_if_the_input_needs_none() -> None:
    torch.manual_seed(2)
    weights = make_weights(2, 4, 3, "gelu", True, torch.float64).map(Tensor.detach)
    grads = weights.map(torch.zeros_like)
    x, dy = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    grouped_mlp(x, [2, 3], weights, "gelu", grads).backward(dy)
    exact = weights.map(lambda t: t.clone().requires_grad_())
    twin(x, [2, 3], exact, "gelu").backward(dy)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, getattr(exact, name).grad, rtol=1e-11, atol=1e-12)


def test_gradients_of_strided_and_broadcast_outputs() -> None:
    """`y.sum()` gives a gradient of stride 0, a slice one with gaps."""
    torch.manual_seed(3)
    weights = make_weights(2, 4, 3, "swiglu", True, torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = grouped_mlp(x, [2, 3], weights, "swiglu")
    z = twin(x, [2, 3], weights, "swiglu")
    for scalar in (lambda t: t.sum(), lambda t: t[:, ::2].square().sum()):
        got = torch.autograd.grad(scalar(y), [x, *(t for _, t in weights.items())], retain_graph=True)
        wanted = torch.autograd.grad(scalar(z), [x, *(t for _, t in weights.items())], retain_graph=True)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_no_gradient_mode_leaves_main_gradients_alone() -> None:
    weights = make_weights(2, 4, 3, "gelu", True, torch.float32)
    grads = weights.map(torch.zeros_like)
    with torch.no_grad():
        y = grouped_mlp(torch.randn(4, 3), [4, 0], weights, "gelu", grads)
    assert not y.requires_grad
    assert all(not g.any() for _, g in grads.items())
