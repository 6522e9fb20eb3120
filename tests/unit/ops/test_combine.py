from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_samoe.ops import combine_chunks, reference
from megatron_samoe.ops.combine import combine_banks, combine_banks_backward
from megatron_samoe.runtime.reference_checks import check_combine, combine_inputs
from tests.harness.devices import BEHIND_HOST, CPU, DEVICES, GPU, on
from tests.harness.host_waits import as_if_asynchronous
from tests.harness.op_checks import threads_of_torch


@on(*DEVICES)
@pytest.mark.parametrize("num_elements", [0, 1, 7, 257, 1024, 4100])
@pytest.mark.parametrize("shape", [(1, 1, 1), (12, 1, 4), (3, 2, 8), (5, 3, 2), (1, 2, 19), (20, 1, 2)])
def test_equals_the_reference(device, shape, num_elements):
    check_combine(*combine_inputs(*shape, num_elements), device)


@on(CPU, GPU)
@pytest.mark.parametrize("shape", [(6, 2, 4, 400_003), (6, 2, 4, 400_016)])
def test_large_results_written_past_the_cache(device, shape):
    check_combine(*combine_inputs(*shape), device)


@given(
    num_layers=st.integers(1, 6),
    num_groups=st.integers(1, 4),
    num_banks=st.integers(1, 18),
    num_elements=st.integers(0, 600),
    zeros=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=80)
def test_equals_the_twin_for_any_shape(num_layers, num_groups, num_banks, num_elements, zeros, seed):
    coefficients_LGP, banks_PGN, dW_LGN = combine_inputs(num_layers, num_groups, num_banks, num_elements, seed)
    if zeros:
        coefficients_LGP[coefficients_LGP < 0.3] = 0.0
    check_combine(coefficients_LGP, banks_PGN, dW_LGN)


@pytest.mark.parametrize("chunk", [1, 900])
@pytest.mark.parametrize("num_elements", [0, 1, 512, 3_700])
@pytest.mark.parametrize("shape", [(1, 1, 1), (12, 1, 4), (5, 7, 2), (2, 1, 20)])
def test_the_fallback_goes_by_chunks(shape, num_elements, chunk, monkeypatch):
    monkeypatch.setattr(combine_chunks, "_CHUNK_ELEMENTS", chunk)
    with as_if_asynchronous():
        check_combine(*combine_inputs(*shape, num_elements))


@on(*DEVICES)
@pytest.mark.parametrize("start", [20, 21])
def test_strided_banks_outputs_and_gradients(device, start):
    inputs = combine_inputs(3, 4, 5, 48)
    exact = reference.combine_banks(*inputs[:2], torch.float32)
    exact_dbanks, exact_dcoefficients = reference.combine_banks_backward(*inputs)
    coefficients_LGP, banks_PGN, dW_LGN = (t.to(device) for t in inputs)
    wide_banks, wide_gradient = torch.zeros(5, 4, 100, device=device), torch.zeros(5, 4, 100, device=device)
    strided_banks, gradient = (t[:, :, start : start + 48] for t in (wide_banks, wide_gradient))
    strided_banks.copy_(banks_PGN)
    out_GLN = torch.full((4, 3, 48), 7.0, device=device)
    for banks in (strided_banks, banks_PGN.transpose(0, 1).contiguous().transpose(0, 1)):
        torch.testing.assert_close(combine_banks(coefficients_LGP, banks).cpu(), exact, rtol=1e-5, atol=1e-5)
        returned = combine_banks(coefficients_LGP, banks, out_LGN=out_GLN.transpose(0, 1))
        assert returned.data_ptr() == out_GLN.data_ptr()
        torch.testing.assert_close(returned.cpu(), exact, rtol=1e-5, atol=1e-5)
    strided_dW = dW_LGN.transpose(0, 1).contiguous().transpose(0, 1)
    dcoefficients = combine_banks_backward(coefficients_LGP, strided_banks, strided_dW, gradient)
    torch.testing.assert_close(dcoefficients.cpu(), exact_dcoefficients, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient.cpu(), exact_dbanks, rtol=1e-5, atol=1e-5)
    gradient.zero_()
    assert not wide_gradient.any(), "nothing is written beside it"


@on(CPU, BEHIND_HOST, GPU)
def test_coefficient_gradient_is_summed_in_double(device):
    coefficients_LGP, banks_PGN, dW_LGN = (t.abs().to(device) for t in combine_inputs(2, 1, 2, 1 << 20))
    dcoefficients = combine_banks_backward(coefficients_LGP, banks_PGN, dW_LGN, torch.zeros_like(banks_PGN))
    exact = torch.einsum("lgn,pgn->lgp", dW_LGN.double(), banks_PGN.double())
    torch.testing.assert_close(dcoefficients.double(), exact, rtol=2e-7, atol=0)


def test_the_references_gradients_are_those_of_autograd():
    coefficients_LGP, banks_PGN, dW_LGN = combine_inputs(3, 2, 4, 5, dtype=torch.float64)
    a, t = coefficients_LGP.clone().requires_grad_(), banks_PGN.clone().requires_grad_()
    reference.combine_banks(a, t, torch.float64).backward(dW_LGN)
    dbanks_PGN = torch.zeros_like(banks_PGN)
    dcoefficients = combine_banks_backward(coefficients_LGP, banks_PGN, dW_LGN, dbanks_PGN)
    torch.testing.assert_close(dcoefficients, a.grad)
    torch.testing.assert_close(dbanks_PGN, t.grad)


def test_the_result_does_not_depend_on_threads():
    arguments = combine_inputs(4, 2, 4, 50_000)
    results = []
    for threads in (1, 2, 3):
        with threads_of_torch(threads):
            dbanks = torch.zeros_like(arguments[1])
            results.append((combine_banks(*arguments[:2]), combine_banks_backward(*arguments, dbanks), dbanks))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-4)
        assert torch.equal(result[0], results[0][0])
