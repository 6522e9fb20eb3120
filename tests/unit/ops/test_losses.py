"""Fused losses against their references; tests/unit/tensor_parallel compares with torch's own and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_samoe.ops import reference
from megatron_samoe.ops.cross_entropy import cross_entropy_parts
from megatron_samoe.ops.kl_divergence import kl_divergence_backward, kl_divergence_terms, scaled_logsumexp
from tests.harness.devices import CPU, GPU, on
from tests.harness.op_checks import check_cross_entropy


@on(CPU, GPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 513])
@pytest.mark.parametrize("width, first_id", [(1, 0), (5, 3), (64, 0), (257, 100), (5003, 0), (0, 12)])
def test_equals_the_reference(device, num_tokens, width, first_id, dtype):
    check_cross_entropy(num_tokens, width, first_id, num_tokens + width, dtype, device)


@on(CPU, GPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_written_past_the_cache(device, dtype):
    check_cross_entropy(700, 16_384, 0, 1, dtype, device)


@given(st.integers(0, 40), st.integers(0, 300), st.integers(0, 50), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None, max_examples=60)
def test_equals_the_twin_for_any_shape(num_tokens, width, first_id, dtype):
    check_cross_entropy(num_tokens, width, first_id, 3, dtype)


def test_extreme_and_not_a_number_logits():
    logits_TV = torch.tensor([[1e4, -1e4, 0.0], [-torch.inf, 2.0, 1.0], [torch.nan, 0.0, 1.0], [3e38, 0.0, 1.0]])
    labels_T = torch.tensor([0, 1, 1, 0])
    peak_T, sum_T, target_T = cross_entropy_parts(logits_TV, labels_T)
    loss_T = sum_T.log() + peak_T - target_T
    expected = F.cross_entropy(logits_TV, labels_T, reduction="none")
    assert loss_T[2].isnan() and expected[2].isnan()
    torch.testing.assert_close(loss_T[[0, 1, 3]], expected[[0, 1, 3]])


TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 8e-3}


def example(num_tokens: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logits of student and teacher, and dkl_T."""
    generator = torch.Generator().manual_seed(num_tokens + width)
    student, teacher = (torch.randn(num_tokens, width, generator=generator).mul(4).to(dtype) for _ in range(2))
    return student, teacher, torch.randn(num_tokens, generator=generator).to(torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("num_tokens", "width"), [(0, 5), (1, 1), (7, 64), (33, 1001), (5, 0), (3, 1 << 17)])
def test_equals_the_twin(num_tokens: int, width: int, temperature: float, dtype: torch.dtype) -> None:
    student_TV, teacher_TV, dkl_T = example(num_tokens, width, dtype)
    exact = [t.double() for t in (student_TV, teacher_TV)]
    lses = [scaled_logsumexp(t, temperature) for t in (student_TV, teacher_TV)]
    twins = [reference.scaled_logsumexp(t, temperature) for t in exact]
    loose = {"rtol": max(TOLERANCE[dtype], 2e-6) if dtype != torch.float64 else 1e-11, "atol": 1e-5}
    for lse_T, twin_T in zip(lses, twins, strict=True):
        torch.testing.assert_close(lse_T.double(), twin_T, rtol=loose["rtol"], atol=0.0)
    if not width:
        return
    kl_T = kl_divergence_terms(student_TV, teacher_TV, *lses, temperature)
    assert kl_T.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(
        kl_T.double(), reference.kl_divergence_terms(*exact, *twins, temperature), rtol=2e-5, atol=1e-6
    )
    dstudent_TV = kl_divergence_backward(student_TV, teacher_TV, *lses, temperature, dkl_T)
    assert dstudent_TV.dtype == dtype
    expected = reference.kl_divergence_backward(*exact, *twins, temperature, dkl_T.double())
    torch.testing.assert_close(dstudent_TV.double(), expected, rtol=5 * TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_small_divergence_keeps_its_digits_and_none_is_negative() -> None:
    student_TV, _, _ = example(50, 300, torch.float32)
    teacher_TV = student_TV + 1e-2 * torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    lses = [scaled_logsumexp(t, 1.0) for t in (student_TV, teacher_TV)]
    kl_T = kl_divergence_terms(student_TV, teacher_TV, *lses, 1.0)
    q, p = (t.double().log_softmax(dim=1) for t in (student_TV, teacher_TV))
    expected_T = F.kl_div(q, p, log_target=True, reduction="none").sum(dim=1)
    assert expected_T.max() < 1e-3
    # From the logarithms of two softmaxes the smallest would not keep to this.
    torch.testing.assert_close(kl_T.double(), expected_T, rtol=1e-2, atol=6e-8)
    same = kl_divergence_terms(student_TV, student_TV, lses[0], lses[0], 1.0)
    assert torch.equal(same, torch.zeros(50))


def test_tokens_that_the_teacher_excludes() -> None:
    """A teacher's logit of -inf adds nothing; a student's where the teacher's is finite makes the divergence infinite."""
    teacher_TV = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 1.0, 2.0]], dtype=torch.float64)
    student_TV = torch.tensor([[0.5, 0.0, 1.0], [0.5, 0.0, -torch.inf]], dtype=torch.float64)
    lses = [scaled_logsumexp(t, 1.0) for t in (student_TV, teacher_TV)]
    kl_T = kl_divergence_terms(student_TV, teacher_TV, *lses, 1.0)
    p, q = teacher_TV[0].softmax(0)[:2], student_TV[0].softmax(0)[:2]
    torch.testing.assert_close(kl_T[0], (p * (p / q).log()).sum())
    assert kl_T[1] == torch.inf
    got = kl_divergence_backward(student_TV, teacher_TV, *lses, 1.0, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(got, student_TV.softmax(1) - teacher_TV.softmax(1))
