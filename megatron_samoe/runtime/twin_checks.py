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
from megatron_samoe.ops.adamw import AdamWRates, AdamWRun, adamw
from megatron_samoe.ops.combine import combine_banks, combine_banks_backward
from megatron_samoe.ops.cross_entropy import cross_entropy_backward, cross_entropy_parts
from megatron_samoe.ops.grouped_mlp import ExpertWeights, activate, activation_backward, grouped_mlp
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
    num_groups: int,
    device: Device = "cpu",
    key_TE: Tensor | None = None,
) -> None:
    """Compares topk_gate on a device with its reference for fp32 logits."""
    key = None if key_TE is None else key_TE.to(device)
    twin_arguments = (topk, score_function == "sigmoid", pre_softmax, num_groups, key_TE)

    def fast(x_TE: Tensor) -> tuple[Tensor, ...]:
        result = topk_gate(x_TE, topk, score_function, pre_softmax, num_groups, key)
        return result.probs_TK, result.ids_TK, result.counts_GE, result.score_sum_GE, result.z_sum

    logits_TE = logits_TE.to(device)
    got = [t.cpu() for t in fast(logits_TE)]
    expected = reference.topk_gate(logits_TE.cpu().double(), *twin_arguments)
    assert torch.equal(got[1], expected[1]) and torch.equal(got[2], expected[2])
    for index in (0, 3, 4):
        assert got[index].dtype == torch.float32 and got[index].shape == expected[index].shape
        torch.testing.assert_close(got[index].double(), expected[index], rtol=2e-5, atol=1e-6)
    num_tokens, num_experts = logits_TE.shape
    generator = torch.Generator().manual_seed(7)
    weights = [
        torch.randn(num_tokens, topk, generator=generator),
        torch.randn(num_groups, num_experts, generator=generator),
        torch.randn((), generator=generator),
    ]
    gradient = _gate_gradient(fast, logits_TE, [w.to(device) for w in weights])
    exact = _gate_gradient(
        lambda x: reference.topk_gate(x, *twin_arguments), logits_TE.cpu().double(), [w.double() for w in weights]
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


def cross_entropy_inputs(
    num_tokens: int, width: int, first_id: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns random logits_TV, labels_T (some in no column) and dloss_T."""
    generator = torch.Generator().manual_seed(seed)
    logits_TV = (torch.randn(num_tokens, width, generator=generator) * 4).to(dtype)
    labels_T = torch.randint(0, first_id + width + 5, (num_tokens,), generator=generator)
    dloss_T = torch.randn(num_tokens, generator=generator)
    return logits_TV, labels_T, dloss_T


def check_cross_entropy(
    num_tokens: int, width: int, first_id: int, seed: int, dtype: torch.dtype, device: Device = "cpu"
) -> None:
    """Compares cross_entropy_parts and cross_entropy_backward on a device with their references."""
    logits_TV, labels_T, dloss_T = cross_entropy_inputs(num_tokens, width, first_id, seed, dtype)
    exact = reference.cross_entropy_parts(logits_TV.double(), labels_T, first_id)
    got = cross_entropy_parts(logits_TV.to(device), labels_T.to(device), first_id)
    for part, expected in zip(got, exact, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part.cpu().double(), expected, rtol=2e-6, atol=1e-6)
    logsumexp_T = exact[0] + exact[1].log()
    dlogits_TV = cross_entropy_backward(
        logits_TV.to(device), labels_T.to(device), first_id, logsumexp_T.float().to(device), dloss_T.to(device)
    ).cpu()
    assert dlogits_TV.dtype == dtype
    expected = reference.cross_entropy_backward(logits_TV.double(), labels_T, first_id, logsumexp_T, dloss_T.double())
    tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-5}
    torch.testing.assert_close(dlogits_TV.double(), expected, **tolerance)


def expert_weights(
    E: int, F: int, H: int, activation: str, bias: bool, dtype: torch.dtype, device: Device = "cpu"
) -> ExpertWeights:
    """Returns random weights of E experts that require gradients."""
    up = (2, F) if activation == "swiglu" else (F,)

    def new(*shape: int) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) * 0.4).to(device, dtype).requires_grad_()

    return ExpertWeights(new(E, *up, H), new(E, H, F), new(E, *up) if bias else None, new(E, H) if bias else None)


def grouped_mlp_twin(x_RH: Tensor, rows: Sequence[int], w: ExpertWeights, activation: str) -> Tensor:
    """Returns the reference's y_RH."""
    return reference.grouped_mlp(x_RH, rows, w.w1, w.w2, w.b1, w.b2, activation == "swiglu")


def routed_rows(num_tokens: int, topk: int, num_experts: int, seed: int) -> list[int]:
    """Returns rows per expert of tokens that each chose topk experts, the first experts more often than the last."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(num_experts, 0, -1, dtype=torch.float64)
    weights[num_experts // 2] = 1e-9  # nearly never chosen
    if num_tokens == 0:
        return [0] * num_experts
    ids = torch.multinomial(weights.expand(num_tokens, -1), topk, generator=generator)
    return torch.bincount(ids.flatten(), minlength=num_experts).tolist()


def check_grouped_mlp(
    rows: list[int],
    F: int,
    H: int,
    activation: Any,
    bias: bool,
    dtype: torch.dtype,
    tolerance: float,
    main_grads: bool,
    device: Device = "cpu",
) -> None:
    """Compares grouped_mlp on a device with its reference in fp64: the output and the gradients of all inputs.

    Args:
        main_grads: whether gradients are added twice to fp32 main gradients; else autograd gets them.
    """
    weights = expert_weights(len(rows), F, H, activation, bias, dtype, device)
    x = torch.randn(sum(rows), H, dtype=torch.float64).to(device, dtype).requires_grad_()
    dy = torch.randn(sum(rows), H, dtype=torch.float64).to(device, dtype)
    exact = weights.map(lambda t: t.detach().cpu().double().requires_grad_())
    exact_x = x.detach().cpu().double().requires_grad_()
    expected = grouped_mlp_twin(exact_x, rows, exact, activation)
    expected.backward(dy.cpu().double())

    grads = None
    repeats = 1
    if main_grads:
        wide = torch.promote_types(dtype, torch.float32)
        grads, repeats = weights.map(lambda t: torch.ones_like(t, dtype=wide, requires_grad=False)), 2
    counts = torch.tensor(rows, device=device)
    for _ in range(repeats):
        x.grad = None
        y = grouped_mlp(x, counts, weights, activation, grads)
        assert y.dtype == dtype
        y.backward(dy)

    def check(name: str, actual: Tensor | None, wanted: Tensor | None) -> None:
        assert actual is not None and wanted is not None, name
        scale = max(1.0, float(wanted.detach().abs().max())) if wanted.numel() else 1.0
        torch.testing.assert_close(
            actual.cpu().double(), wanted.detach(), rtol=tolerance, atol=tolerance * scale, msg=lambda m: f"{name}: {m}"
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


RATES = AdamWRates(lr=0.02, beta1=0.85, beta2=0.97, eps=1e-6, weight_decay=0.2)


def adamw_runs(sizes: Sequence[int], dtype: torch.dtype, bf16_weights: bool, device: Device = "cpu") -> list[AdamWRun]:
    """Returns runs of some sizes with zero moments; with `bf16_weights` every second one has a weight to follow."""
    generator = torch.Generator().manual_seed(1)
    runs = []
    for number, size in enumerate(sizes):
        master = torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)
        weight = master.bfloat16() if bf16_weights and number % 2 else None
        runs.append(AdamWRun(master, weight, *(torch.zeros_like(master) for _ in range(3))))
    return runs


def set_gradients(runs: list[AdamWRun], step: int) -> None:
    """Fills the gradients of a step with random numbers, the same on every device."""
    generator = torch.Generator().manual_seed(100 + step)
    for run in runs:
        run.grad.copy_(torch.randn(run.grad.shape, generator=generator, dtype=torch.float64))


def check_adamw(
    sizes: Sequence[int], dtype: torch.dtype, tolerance: float, num_steps: int = 6, device: Device = "cpu"
) -> None:
    """Compares adamw on a device with torch.optim.AdamW on the CPU: masters, moments, and weights that follow."""
    runs = adamw_runs(sizes, dtype, bf16_weights=True, device=device)
    theirs = [run.master.cpu().clone().requires_grad_() for run in runs]
    optimizer = torch.optim.AdamW(
        theirs, lr=RATES.lr, betas=(RATES.beta1, RATES.beta2), eps=RATES.eps, weight_decay=RATES.weight_decay
    )
    for step in range(1, num_steps + 1):
        set_gradients(runs, step)
        for run, p in zip(runs, theirs, strict=True):
            p.grad = run.grad.cpu().clone()
        adamw(runs, RATES, step)
        optimizer.step()
        for run, p in zip(runs, theirs, strict=True):
            torch.testing.assert_close(run.master.cpu(), p.detach(), rtol=tolerance, atol=tolerance)
            if run.weight is not None:
                assert torch.equal(run.weight, run.master.bfloat16())
    for run, p in zip(runs, theirs, strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                getattr(run, moment).cpu(), optimizer.state[p][moment], rtol=10 * tolerance, atol=tolerance
            )


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
