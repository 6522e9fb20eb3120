"""The chunked KL divergence against its twin, and against torch's formula and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_samoe.ops import kl_divergence, reference
from megatron_samoe.ops.kl_divergence import kl_divergence_backward, kl_divergence_terms, scaled_logsumexp

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 8e-3}


def example(num_tokens: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logits of student and teacher, and dkl_T."""
    generator = torch.Generator().manual_seed(num_tokens + width)
    student, teacher = (torch.randn(num_tokens, width, generator=generator).mul(4).to(dtype) for _ in range(2))
    return student, teacher, torch.randn(num_tokens, generator=generator).to(torch.promote_types(dtype, torch.float32))


def plain_kl(student_TV: Tensor, teacher_TV: Tensor, temperature: float) -> Tensor:
    q, p = ((logits / temperature).log_softmax(dim=1) for logits in (student_TV, teacher_TV))
    return F.kl_div(q, p, log_target=True, reduction="none").sum(dim=1)


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


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_equals_autograd_in_double_precision(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl_divergence, "_CPU_CHUNK", 300)  # several chunks, the last one shorter
    student_TV, teacher_TV, dkl_T = example(10, 101)
    student_TV.requires_grad_()
    expected_T = plain_kl(student_TV, teacher_TV, temperature)
    (expected_TV,) = torch.autograd.grad(expected_T, student_TV, dkl_T)
    student_TV = student_TV.detach()
    lses = [scaled_logsumexp(t, temperature) for t in (student_TV, teacher_TV)]
    kl_T = kl_divergence_terms(student_TV, teacher_TV, *lses, temperature)
    torch.testing.assert_close(kl_T, expected_T.detach(), rtol=1e-11, atol=1e-13)
    got_TV = kl_divergence_backward(student_TV, teacher_TV, *lses, temperature, dkl_T)
    torch.testing.assert_close(got_TV, expected_TV, rtol=1e-11, atol=1e-13)


def test_a_small_divergence_keeps_its_digits_and_none_is_negative() -> None:
    student_TV, _, _ = example(50, 300, torch.float32)
    teacher_TV = student_TV + 1e-2 * torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    lses = [scaled_logsumexp(t, 1.0) for t in (student_TV, teacher_TV)]
    kl_T = kl_divergence_terms(student_TV, teacher_TV, *lses, 1.0)
    expected_T = plain_kl(student_TV.double(), teacher_TV.double(), 1.0)
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


def test_logits_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(3, 5\)"):
        kl_divergence_terms(torch.zeros(3, 4), torch.zeros(3, 5), torch.zeros(3), torch.zeros(3), 1.0)
