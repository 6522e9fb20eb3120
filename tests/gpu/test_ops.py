"""The ops of a GPU against their twins on the CPU: results and all gradients, streams, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_samoe.ops.combine import combine_banks_backward
from megatron_samoe.ops.cross_entropy import cross_entropy_parts
from megatron_samoe.ops.permute import gather_rows, invert_index, make_permutation, permute, unpermute
from megatron_samoe.ops.topk_gate import topk_gate
from megatron_samoe.runtime import reference_checks
from tests.harness import op_checks
from tests.harness.ranks import RankFailure, run_ranks

DTYPES = (torch.float32, torch.bfloat16)


def token_counts(device: str) -> tuple[int, ...]:
    return (0, 1, 7, 513) if device == "cuda" else (0, 7)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("topk, num_experts", [(1, 1), (1, 5), (2, 64), (8, 33), (40, 300)])
def test_gate(topk: int, num_experts: int, score_function: str, device: str) -> None:
    for num_tokens in token_counts(device):
        logits_TE = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(topk)) * 3
        for pre_softmax in (False, True):
            for num_groups in {1, max(num_tokens, 1)}:
                reference_checks.check_gate(logits_TE, topk, score_function, pre_softmax, num_groups, device)
                reference_checks.check_gate(logits_TE.round(), topk, score_function, pre_softmax, num_groups, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("topk, num_experts, hidden", [(1, 4, 1), (2, 64, 64), (8, 9, 100), (8, 300, 1024)])
def test_permutation_and_rows(topk: int, num_experts: int, hidden: int, dtype: torch.dtype, device: str) -> None:
    for num_tokens in token_counts(device):
        for drop in (False, True):
            ids_TK = reference_checks.random_ids(num_tokens, topk, num_experts, drop, num_tokens)
            reference_checks.check_rows(ids_TK, num_experts, hidden, dtype, device)
    for expert in (0, num_experts - 1, -1):  # all to one, to the last, to none
        reference_checks.check_rows(torch.full((50, 1), expert), num_experts, hidden, dtype, device)
    x_RH = torch.randn(37, hidden).to(device, dtype).requires_grad_()
    index_R = torch.randperm(37).to(device)
    y_RH = gather_rows(x_RH, index_R, invert_index(index_R))
    dy_RH = torch.randn(37, hidden).to(device, dtype)
    assert torch.equal(y_RH, x_RH[index_R])
    assert torch.equal(torch.autograd.grad(y_RH, x_RH, dy_RH)[0][index_R], dy_RH)


def test_combination(device: str) -> None:
    shapes = [(1, 1, 1, 0), (12, 1, 4, 257), (3, 2, 8, 1024), (1, 2, 19, 7)]
    for shape in shapes + ([(20, 1, 2, 4100), (24, 64, 8, 3072)] if device == "cuda" else []):
        reference_checks.check_combine(*reference_checks.combine_inputs(*shape), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy(dtype: torch.dtype, device: str) -> None:
    sizes = [(0, 5, 3), (1, 1, 0), (7, 5003, 0), (40, 257, 100), (3, 0, 12)]
    for num_tokens, width, first_id in sizes + ([(513, 50257, 0)] if device == "cuda" else []):
        op_checks.check_cross_entropy(num_tokens, width, first_id, num_tokens + width, dtype, device)


def test_adamw(device: str) -> None:
    sizes = [0, 1, 7, 16, 513, 4000] + ([1_000_003] if device == "cuda" else [])
    op_checks.check_adamw(sizes, torch.float32, 2e-6, num_steps=3, device=device)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_expert_mlps(activation: str, dtype: torch.dtype, tolerance: float, device: str) -> None:
    """Empty experts, one expert with all rows, widths that fill no vector; with and without main gradients."""
    torch.manual_seed(0)
    cases = [([3, 5, 2], 7, 4), ([0, 6, 0, 1], 8, 16), ([0, 0], 3, 2), ([1], 1, 1), ([17, 0, 33], 16, 24)]
    if device == "cuda":
        cases += [([0, 513, 0], 64, 128), (op_checks.routed_rows(513, 8, 33, seed=1), 48, 64)]
    for rows, width, hidden in cases:
        for bias, main_grads in ((False, True), (True, False), (True, True)):
            op_checks.check_grouped_mlp(rows, width, hidden, activation, bias, dtype, tolerance, main_grads, device)


def _results(device: str) -> list[Tensor]:
    """Sums of floats of every kind that the ops make, for equal inputs."""
    generator = torch.Generator().manual_seed(3)
    logits_TE, x_TH, dy_TH = (torch.randn(700, n, generator=generator).to(device) for n in (24, 96, 96))
    gate = topk_gate(logits_TE.requires_grad_(), 2, num_sequences=7)
    permutation = make_permutation(gate.ids_TK, 24)
    y_TH = unpermute(permute(x_TH.requires_grad_(), permutation), gate.probs_TK, permutation)
    gradients = torch.autograd.grad(
        (y_TH * dy_TH).sum() + gate.z_sum + gate.score_sum_GE.square().sum(), (logits_TE, x_TH)
    )
    banks = [t.to(device) for t in reference_checks.combine_inputs(12, 3, 4, 5000)]
    dbanks_PGN = torch.zeros_like(banks[1])
    dcoefficients_LGP = combine_banks_backward(*banks, dbanks_PGN)
    parts = cross_entropy_parts(torch.randn(50, 4099, generator=generator).to(device), gate.ids_TK[:50, 0])
    return [t.detach() for t in (y_TH, *gradients, dcoefficients_LGP, dbanks_PGN, gate.z_sum, *parts)]


def test_equal_inputs_give_equal_bits(device: str) -> None:
    for first, second in zip(_results(device), _results(device), strict=True):
        assert torch.equal(first, second)


def test_ops_run_on_the_current_stream(device: str) -> None:
    """The input is written late on a stream of its own; an op that ran on another would read what was there before."""
    module = torch.get_device_module(device)
    logits_TE = torch.randn(4000, 64, generator=torch.Generator().manual_seed(1))
    expected = topk_gate(logits_TE, 8)
    late_TE, source_TE = torch.zeros(logits_TE.shape, device=device), logits_TE.to(device)
    module.synchronize()
    with module.stream(module.Stream()):
        if device == "cuda":
            torch.cuda._sleep(100_000_000)  # clock cycles
        late_TE.copy_(source_TE)
        gate = topk_gate(late_TE, 8)
        moved_NH = permute(late_TE, make_permutation(gate.ids_TK, 64))
        ids_TK, probs_TK, sum_H = gate.ids_TK.cpu(), gate.probs_TK.cpu(), moved_NH.sum(0).cpu()
    assert torch.equal(ids_TK, expected.ids_TK)
    torch.testing.assert_close(probs_TK, expected.probs_TK)
    torch.testing.assert_close(sum_H, 8 * logits_TE.sum(0), rtol=1e-4, atol=1e-3)


def _read_foreign_row(device: str) -> None:
    from megatron_samoe.ops import extension

    assert extension.load()
    rows = torch.ops.megatron_samoe.permute(torch.zeros(4, 8, device=device), torch.tensor([0, 9]).to(device), 1)
    torch.get_device_module(device).synchronize()
    print(rows)


def test_an_index_that_names_no_row_stops_the_op(device: str) -> None:
    """In a process of its own: on a GPU nothing else can run after it."""
    with pytest.raises(RankFailure, match="outside 0 to 3" if device == "cpu" else "assert"):
        run_ranks(_read_foreign_row, 1, device)


def test_what_is_refused(device: str) -> None:
    ids_TK = torch.zeros(3, 1, dtype=torch.int64)
    x = torch.zeros(4, 8)
    ops = torch.ops.megatron_samoe
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: ops.topk_gate(x.double().to(device), 1, False, False, 1), "not Float"),
        (lambda: ops.topk_gate(x.to(device).t(), 1, False, False, 1), "not contiguous"),
        (lambda: ops.permute(x.half().to(device), ids_TK.flatten().to(device), 1), "not Float or BFloat16"),
    ]
    if device == "cuda":
        calls.append((lambda: ops.permute(x.to(device), ids_TK.flatten(), 1), "is on cpu"))
    for call, said in calls:
        with pytest.raises(RuntimeError, match=said):
            call()
