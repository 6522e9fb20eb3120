"""Ops against their reference implementations, on any device: results and all gradients. The references run on the CPU, mostly in fp64.

A difference is an AssertionError. The package's tests call these checks with many sizes; a run on GPUs calls the small
ones at its start (`runtime.kernels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.ops import reference
from megatron_samoe.ops.combine import combine_banks, combine_banks_backward
from megatron_samoe.ops.grouped_mlp import activate, activation_backward
from megatron_samoe.ops.permute import make_permutation, permute, unpermute
from megatron_samoe.ops.topk_gate import SCORE_FUNCTIONS, topk_gate

Device = torch.device | str
ROW_TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.bfloat16: {"rtol": 8e-3, "atol": 8e-3},
}


def _gate_gradient(gate: Any, logits_TE: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The gradient of a random function of everything differentiable that the gate returns."""
    x_TE = logits_TE.clone().requires_grad_()
    probs_TK, _ids, _counts, score_sum_GE, z_sum = gate(x_TE)
    loss = (probs_TK * weights[0]).sum() + (score_sum_GE * weights[1]).sum() + z_sum * weights[2]
    return torch.autograd.grad(loss, x_TE)[0]


def check_gate(
    logits_TE: Tensor,
    topk: int,
    score_function: str,
    pre_softmax: bool,
    num_sequences: int,
    device: Device = "cpu",
    key_TE: Tensor | None = None,
) -> None:
    """Compares topk_gate on a device with its reference for fp32 logits."""
    key = None if key_TE is None else key_TE.to(device)
    reference_arguments = (topk, score_function == "sigmoid", pre_softmax, num_sequences, key_TE)

    def fast(x_TE: Tensor) -> tuple[Tensor, ...]:
        result = topk_gate(x_TE, topk, score_function, pre_softmax, num_sequences, key)
        return result.probs_TK, result.ids_TK, result.counts_GE, result.score_sum_GE, result.z_sum

    logits_TE = logits_TE.to(device)
    got = [t.cpu() for t in fast(logits_TE)]
    expected = reference.topk_gate(logits_TE.cpu().double(), *reference_arguments)
    assert torch.equal(got[1], expected[1]) and torch.equal(got[2], expected[2])
    for index in (0, 3, 4):
        assert got[index].dtype == torch.float32 and got[index].shape == expected[index].shape
        torch.testing.assert_close(got[index].double(), expected[index], rtol=2e-5, atol=1e-6)
    num_tokens, num_experts = logits_TE.shape
    generator = torch.Generator().manual_seed(7)
    weights = [
        torch.randn(num_tokens, topk, generator=generator),
        torch.randn(num_sequences, num_experts, generator=generator),
        torch.randn((), generator=generator),
    ]
    gradient = _gate_gradient(fast, logits_TE, [w.to(device) for w in weights])
    exact = _gate_gradient(
        lambda x: reference.topk_gate(x, *reference_arguments), logits_TE.cpu().double(), [w.double() for w in weights]
    )
    torch.testing.assert_close(gradient.cpu().double(), exact, rtol=5e-5, atol=5e-6)


def random_ids(num_tokens: int, topk: int, num_experts: int, drop: bool, seed: int) -> Tensor:
    """Returns ids_TK, different experts for each token; with `drop` three slots in ten are -1."""
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :topk].contiguous()
    if drop:
        ids_TK[torch.rand(num_tokens, topk, generator=generator) < 0.3] = -1
    return ids_TK


def check_rows(ids_TK: Tensor, num_experts: int, hidden: int, dtype: torch.dtype, device: Device = "cpu") -> None:
    """Compares make_permutation, permute and unpermute on a device with their references."""
    num_tokens, topk = ids_TK.shape
    generator = torch.Generator().manual_seed(5)
    x_TH = torch.randn(num_tokens, hidden, generator=generator).to(dtype).requires_grad_()
    probs_TK = torch.rand(num_tokens, topk, generator=generator).requires_grad_()
    permutation = make_permutation(ids_TK.to(device), num_experts)
    expected_permutation = reference.make_permutation(ids_TK, num_experts)
    num_kept = int(permutation.counts_E.sum())
    assert permutation.ends_E.dtype == torch.int32 and int(permutation.ends_E[-1]) == permutation.num_rows
    kept = permutation.kept(num_kept)
    for field, expected in zip(
        ("slot_of_row_N", "row_of_slot_TK", "counts_E", "ends_E"), expected_permutation, strict=True
    ):
        assert torch.equal(getattr(kept, field).cpu(), expected), field
    slot_of_row_N = expected_permutation[0]

    def with_unread(rows_NH: Tensor) -> Tensor:
        """Rows of dropped slots, where there are such, hold what nothing may read."""
        unread = rows_NH.new_full((permutation.num_rows - num_kept, hidden), torch.nan)
        return torch.cat((rows_NH.detach(), unread)).to(device)

    device_x = x_TH.detach().to(device).requires_grad_()
    rows_NH = permute(device_x, permutation)
    drows_NH = torch.randn(num_kept, hidden, generator=generator).to(dtype)
    expected_rows = reference.permute(x_TH, slot_of_row_N, topk)
    assert rows_NH.isfinite().all() and torch.equal(rows_NH[:num_kept].cpu(), expected_rows)
    got = torch.autograd.grad(rows_NH, device_x, with_unread(drows_NH))[0]
    expected = torch.autograd.grad(expected_rows, x_TH, drows_NH)[0]
    assert got.dtype == dtype
    torch.testing.assert_close(got.cpu(), expected, **ROW_TOLERANCE[dtype])

    rows_NH = torch.randn(num_kept, hidden, generator=generator).to(dtype).requires_grad_()
    dy_TH = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    device_rows, device_probs = with_unread(rows_NH).requires_grad_(), probs_TK.detach().to(device).requires_grad_()
    y_TH = unpermute(device_rows, device_probs, permutation)
    expected_y = reference.unpermute(rows_NH, probs_TK, slot_of_row_N)
    assert y_TH.dtype == dtype
    torch.testing.assert_close(y_TH.cpu(), expected_y, **ROW_TOLERANCE[dtype])
    drows, dprobs = (t.cpu() for t in torch.autograd.grad(y_TH, (device_rows, device_probs), dy_TH.to(device)))
    expected_drows, expected_dprobs = torch.autograd.grad(expected_y, (rows_NH, probs_TK), dy_TH)
    torch.testing.assert_close(drows[:num_kept], expected_drows, **ROW_TOLERANCE[dtype])
    assert not drows[num_kept:].any(), "the last expert's weights get no gradient from rows of dropped slots"
    # A dot product of `hidden` terms: fp32 in both, summed in another order.
    torch.testing.assert_close(dprobs, expected_dprobs, rtol=1e-4, atol=1e-5 * max(1, hidden) ** 0.5)
    assert (dprobs[ids_TK < 0] == 0).all()


def combine_inputs(
    num_layers: int,
    num_groups: int,
    num_banks: int,
    num_elements: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns random coefficients_LGP, banks_PGN and dW_LGN."""
    generator = torch.Generator().manual_seed(seed)
    coefficients_LGP = torch.randn(num_layers, num_groups, num_banks, generator=generator, dtype=dtype)
    banks_PGN = torch.randn(num_banks, num_groups, num_elements, generator=generator, dtype=dtype)
    dW_LGN = torch.randn(num_layers, num_groups, num_elements, generator=generator, dtype=dtype)
    return coefficients_LGP, banks_PGN, dW_LGN


def check_combine(coefficients_LGP: Tensor, banks_PGN: Tensor, dW_LGN: Tensor, device: Device = "cpu") -> None:
    """Compares combine_banks and its backward on a device with their references; the inputs lie on the CPU."""
    exact = reference.combine_banks(coefficients_LGP.double(), banks_PGN.double(), torch.float64)
    bound = coefficients_LGP.double().abs()
    scale = reference.combine_banks(bound, banks_PGN.double().abs(), torch.float64)
    a, t, dw = (x.to(device) for x in (coefficients_LGP, banks_PGN, dW_LGN))
    for dtype, unit in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        got = combine_banks(a, t, out_dtype=dtype)
        assert got.dtype == dtype and got.shape == dW_LGN.shape
        assert ((got.cpu().double() - exact).abs() <= unit * scale + 1e-30).all()
    start_PGN = torch.randn(banks_PGN.shape, generator=torch.Generator().manual_seed(9))
    dbanks_PGN = start_PGN.clone().to(device)
    dcoefficients_LGP = combine_banks_backward(a, t, dw, dbanks_PGN)
    exact_dbanks, exact_dcoefficients = reference.combine_banks_backward(
        coefficients_LGP.double(), banks_PGN.double(), dW_LGN.double()
    )
    torch.testing.assert_close(dbanks_PGN.cpu().double(), start_PGN.double() + exact_dbanks, rtol=1e-5, atol=1e-5)
    root = max(1, banks_PGN.shape[2]) ** 0.5
    torch.testing.assert_close(dcoefficients_LGP.cpu().double(), exact_dcoefficients, rtol=1e-5, atol=2e-6 * root)


def check_small_gates(device: Device) -> None:
    """Compares the gate over few tokens, ties among them."""
    generator = torch.Generator().manual_seed(1)
    for num_tokens, topk, num_experts, num_groups in ((1, 1, 5, 1), (66, 2, 64, 3)):
        logits_TE = torch.randn(num_tokens, num_experts, generator=generator) * 3
        for score_function in SCORE_FUNCTIONS:
            for pre_softmax in (False, True):
                check_gate(logits_TE, topk, score_function, pre_softmax, num_groups, device)
                check_gate(logits_TE.round(), topk, score_function, pre_softmax, num_groups, device)


def check_small_rows(device: Device) -> None:
    """Compares permutations of few tokens, with and without dropped slots."""
    for dtype in ROW_TOLERANCE:
        for num_tokens, topk, num_experts, hidden in ((1, 1, 4, 1), (33, 2, 9, 100), (513, 2, 64, 64)):
            for drop in (False, True):
                ids_TK = random_ids(num_tokens, topk, num_experts, drop, num_tokens)
                check_rows(ids_TK, num_experts, hidden, dtype, device)


def check_small_combination(device: Device) -> None:
    """Compares combinations of small banks, wide and narrow ones."""
    for shape in ((12, 1, 4, 257), (3, 2, 8, 1024), (20, 2, 2, 4100)):
        check_combine(*combine_inputs(*shape), device)


def check_swiglu(num_rows: int, width: int, dtype: torch.dtype, device: Device = "cpu") -> None:
    """Compares SwiGLU and its gradient on a device with autograd's in fp64."""
    generator = torch.Generator().manual_seed(num_rows + width)
    h_RU = (torch.randn(num_rows, 2 * width, generator=generator) * 3).to(dtype)
    da_RF = torch.randn(num_rows, width, generator=generator).to(dtype)
    exact_h = h_RU.double().requires_grad_()
    gate, up = exact_h.chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    (expected_dh,) = torch.autograd.grad(expected, exact_h, da_RF.double())
    unit = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    a_RF = activate(h_RU.to(device), "swiglu")
    dh_RU, again_RF = activation_backward(da_RF.to(device), h_RU.to(device), "swiglu")
    for got, wanted in ((a_RF, expected.detach()), (again_RF, expected.detach()), (dh_RU, expected_dh)):
        assert got.dtype == dtype and got.shape == wanted.shape
        torch.testing.assert_close(got.cpu().double(), wanted, rtol=4 * unit, atol=4 * unit)


def check_small_swiglu(device: Device) -> None:
    """Compares SwiGLU over few rows, wide and narrow ones."""
    for dtype in ROW_TOLERANCE:
        for num_rows, width in ((1, 1), (37, 24), (5, 256), (9, 77)):
            check_swiglu(num_rows, width, dtype, device)
