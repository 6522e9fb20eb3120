"""KL divergence over a split vocabulary against torch's own over the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_samoe.config import ParallelConfig
from megatron_samoe.parallel_state import initialize_model_parallel, single_process_state
from megatron_samoe.tensor_parallel.kl_divergence import vocab_parallel_kl_divergence
from tests.harness.ranks import run_ranks

V, T, TEMPERATURE = 13, 40, 1.7
#: Widths of the ranks' parts of the vocabulary.
SPLITS = ([7, 6], [13, 0], [0, 13], [1, 12])


def example(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(T, V, generator=generator, dtype=torch.float64).mul(3).to(dtype) for _ in range(2))
    return student, teacher, torch.randn(T, generator=generator, dtype=torch.float64)


def run_split(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    group = initialize_model_parallel(ParallelConfig(tensor_model_parallel_size=2)).tp
    results = []
    for widths in SPLITS:
        student, teacher, weights = example(dtype)
        first = sum(widths[: group.rank])
        columns = slice(first, first + widths[group.rank])
        part = student[:, columns].clone().requires_grad_()
        kl = vocab_parallel_kl_divergence(part, teacher[:, columns], TEMPERATURE, group)
        (kl * weights.to(kl.dtype)).sum().backward()
        assert part.grad is not None
        results.append((kl.detach(), part.grad))
    return results


def check(kl_T: Tensor, grads: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    student, teacher, weights = example(dtype)
    exact = student.double().requires_grad_()
    q, p = ((t / TEMPERATURE).log_softmax(dim=1) for t in (exact, teacher.double()))
    expected = F.kl_div(q, p, log_target=True, reduction="none").sum(dim=1)
    (expected * weights).sum().backward()
    torch.testing.assert_close(kl_T.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    assert kl_T.dtype == torch.promote_types(dtype, torch.float32)
    loose = 1e-2 if dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(grads.double(), exact.grad, rtol=loose, atol=loose)


DTYPES = [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]


@pytest.mark.distributed
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_two_ranks_equal_torch_on_uneven_and_empty_parts(dtype: torch.dtype, tolerance: float) -> None:
    ranks: Any = run_ranks(run_split, 2, dtype)
    for (left, left_grad), (right, right_grad) in zip(*ranks, strict=True):
        assert torch.equal(left, right), "all ranks have the same divergences"
        check(left, torch.cat((left_grad, right_grad), 1), dtype, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_one_rank_equals_torch(dtype: torch.dtype, tolerance: float) -> None:
    student, teacher, weights = example(dtype)
    student.requires_grad_()
    kl_T = vocab_parallel_kl_divergence(student, teacher, TEMPERATURE, single_process_state().tp)
    (kl_T * weights.to(kl_T.dtype)).sum().backward()
    assert student.grad is not None
    check(kl_T.detach(), student.grad, dtype, tolerance)


def test_gradients_of_sums_and_slices() -> None:
    """`kl_T.sum()` gives a gradient of stride 0; logits may be a slice."""
    student, teacher, _ = example(torch.float64)
    whole = torch.cat((student, student), 1).requires_grad_()
    vocab_parallel_kl_divergence(whole[:, :V], teacher, 1.0, single_process_state().tp).sum().backward()
    assert whole.grad is not None
    torch.testing.assert_close(whole.grad[:, :V], student.softmax(1) - teacher.softmax(1), rtol=1e-11, atol=1e-13)
    assert not whole.grad[:, V:].any()
