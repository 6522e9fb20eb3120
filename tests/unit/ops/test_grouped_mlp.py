"""Expert MLPs over sorted rows against plain autograd: outputs and all gradients, over odd sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.ops import cpu_products, extension
from megatron_samoe.ops.grouped_mlp import ExpertWeights, grouped_mlp
from megatron_samoe.runtime.reference_checks import check_swiglu
from tests.harness.devices import CPU, EMULATED, GPU, on
from tests.harness.extension_off import without_extension
from tests.harness.op_checks import (
    check_grouped_mlp,
    expert_weights,
    grouped_mlp_reference,
    routed_rows,
    threads_of_torch,
)

needs_library = pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")
DTYPES = [(torch.float64, 1e-11), (torch.float32, 2e-5), (torch.bfloat16, 4e-2)]


@pytest.fixture(params=["native", "blas", "fp32"])
def bf16_products(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every way in which this processor multiplies experts in bf16."""
    way = request.param
    if way not in cpu_products.possible(cpu_products.this_processor(), torch.ops.megatron_samoe.has_bf16_product()):
        pytest.skip(f"this processor lacks {way}")
    with cpu_products.using(bf16=way):
        yield way


CASES = [([3, 5, 2], 7, 4), ([0, 6, 0, 1], 8, 5), ([0, 0], 3, 2), ([1], 1, 1), ([17, 0, 33], 16, 24)]
CASES += [([0, 513, 0], 64, 128), (routed_rows(513, 8, 33, seed=1), 48, 64)]


@on(CPU, GPU)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
@pytest.mark.parametrize("main_grads", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(("rows", "F", "H"), CASES)
def test_output_and_gradients_equal_autograds(
    rows: list[int],
    F: int,
    H: int,
    activation: str,
    bias: bool,
    main_grads: bool,
    dtype: torch.dtype,
    tolerance: float,
    device: str,
) -> None:
    torch.manual_seed(0)
    check_grouped_mlp(rows, F, H, activation, bias, dtype, tolerance, main_grads, device)


@on(CPU, EMULATED, GPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows, width", [(0, 5), (1, 1), (7, 24), (33, 256), (9, 77)])
def test_swiglu(device: str, num_rows: int, width: int, dtype: torch.dtype) -> None:
    check_swiglu(num_rows, width, dtype, device)


def test_main_gradients_are_filled_even_if_the_input_needs_none() -> None:
    torch.manual_seed(2)
    weights = expert_weights(2, 4, 3, "gelu", True, torch.float64).map(Tensor.detach)
    grads = weights.map(torch.zeros_like)
    x, dy = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    grouped_mlp(x, [2, 3], weights, "gelu", grads).backward(dy)
    exact = weights.map(lambda t: t.clone().requires_grad_())
    grouped_mlp_reference(x, [2, 3], exact, "gelu").backward(dy)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, getattr(exact, name).grad, rtol=1e-11, atol=1e-12)


def test_gradients_of_strided_and_broadcast_outputs() -> None:
    """`y.sum()` gives a gradient of stride 0, a slice one with gaps."""
    torch.manual_seed(3)
    weights = expert_weights(2, 4, 3, "swiglu", True, torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = grouped_mlp(x, [2, 3], weights, "swiglu")
    z = grouped_mlp_reference(x, [2, 3], weights, "swiglu")
    for scalar in (lambda t: t.sum(), lambda t: t[:, ::2].square().sum()):
        got = torch.autograd.grad(scalar(y), [x, *(t for _, t in weights.items())], retain_graph=True)
        wanted = torch.autograd.grad(scalar(z), [x, *(t for _, t in weights.items())], retain_graph=True)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_no_gradient_mode_leaves_main_gradients_alone() -> None:
    weights = expert_weights(2, 4, 3, "gelu", True, torch.float32)
    grads = weights.map(torch.zeros_like)
    with torch.no_grad():
        y = grouped_mlp(torch.randn(4, 3), [4, 0], weights, "gelu", grads)
    assert not y.requires_grad
    assert all(not g.any() for _, g in grads.items())


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("rows", [[3, 5, 0, 2], [17, 0, 33]], ids=str)
def test_the_path_without_the_extension(
    rows: list[int], activation: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_extension(monkeypatch)
    torch.manual_seed(4)
    for main_grads in (False, True):
        check_grouped_mlp(rows, 9, 6, activation, True, dtype, tolerance, main_grads)


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("topk", [1, 2, 8])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 513])
def test_routed_tokens_on_several_threads(
    num_tokens: int, topk: int, activation: str, threads: int, bf16_products: str
) -> None:
    """Few threads and large experts are divided by rows; all sizes are no multiple of a vector."""
    torch.manual_seed(5)
    rows = routed_rows(num_tokens, topk, 9, seed=num_tokens + topk)
    with threads_of_torch(threads):
        for dtype, tolerance in DTYPES[1:]:
            if dtype == torch.bfloat16 or bf16_products == "fp32":
                check_grouped_mlp(rows, 70, 45, activation, threads != 2, dtype, tolerance, main_grads=True)


@needs_library
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("rows", [[0, 0, 600], [600], [300, 0, 301, 3], [2101]], ids=str)
def test_all_tokens_to_one_expert(rows: list[int], activation: str) -> None:
    torch.manual_seed(6)
    with threads_of_torch(2):
        for dtype, tolerance in DTYPES[1:]:
            check_grouped_mlp(rows, 190, 70, activation, True, dtype, tolerance, main_grads=True)


@needs_library
def test_bf16_weight_gradients_are_not_rounded(bf16_products: str) -> None:
    """8 * 257 = 2056 lies between two numbers of bf16."""
    weights = ExpertWeights(torch.zeros(1, 96, 64), torch.zeros(1, 64, 96), torch.full((1, 96), 8.0))
    weights = weights.map(lambda t: t.bfloat16())
    grads = weights.map(lambda t: torch.zeros_like(t, dtype=torch.float32))
    y = grouped_mlp(torch.ones(257, 64).bfloat16(), [257], weights, "gelu", grads)
    y.backward(torch.ones_like(y))
    assert (grads.w2 == 2056).all()


def assert_same_bits(dtype: torch.dtype, rows: list[int], activation: Any, threads: Sequence[int]) -> None:
    """Asserts that a result and all gradients are the same on these numbers of threads."""
    torch.manual_seed(7)
    weights = expert_weights(len(rows), 290, 60, activation, True, dtype).map(Tensor.detach)
    x, dy = torch.randn(sum(rows), 60).to(dtype).requires_grad_(), torch.randn(sum(rows), 60).to(dtype)
    results = []
    for number in threads:
        grads = weights.map(lambda t: torch.zeros_like(t, dtype=torch.float32))
        with threads_of_torch(number):
            y = grouped_mlp(x, rows, weights, activation, grads)
            (dx,) = torch.autograd.grad(y, x, dy)
        results.append([y.detach(), dx, *(g for _, g in grads.items())])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@needs_library
@pytest.mark.parametrize("bf16_products", ["native"], indirect=True)
@pytest.mark.usefixtures("bf16_products")
@pytest.mark.parametrize("rows", [[400, 3, 0, 90, 41], [700, 2], [130, 120, 140, 125]], ids=str)
def test_the_number_of_threads_changes_no_bit_of_bf16(rows: list[int]) -> None:
    """However many threads share an expert, each sum is made in one order; in fp32 on one number of them."""
    assert_same_bits(torch.bfloat16, rows, "gelu", (1, 2, 3))
    assert_same_bits(torch.float32, rows, "swiglu", [2] * 4)


@needs_library
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_bf16_activations_are_exact_to_their_rounding(activation: str) -> None:
    """With weights of one, all bf16 numbers of a range pass through the activation and its gradient."""
    values = torch.arange(-0x8000, 0x8000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = values[values.abs() < 1e4][:, None].contiguous().requires_grad_()
    ones = torch.ones((1, 1, 1) if activation == "gelu" else (1, 2, 1, 1)).bfloat16()
    weights = ExpertWeights(ones, torch.ones(1, 1, 1).bfloat16())
    y = grouped_mlp(x, [len(x)], weights, activation)
    y.backward(torch.ones_like(y))
    exact_x = x.detach().double().requires_grad_()
    exact = grouped_mlp_reference(exact_x, [len(x)], weights.map(Tensor.double), activation)
    exact.sum().backward()
    assert x.grad is not None and exact_x.grad is not None
    # Half a unit in the last of eight bits is 2^-8 at most. Gradients pass through zero; SwiGLU's are two rounded
    # terms.
    half = 1.05 * 2**-8
    torch.testing.assert_close(y.double(), exact.detach(), rtol=half, atol=1e-14)
    tail = 1e-5 if activation == "gelu" else 1e-3
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=2 * half, atol=tail)
