from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_samoe.ops.cross_entropy import cross_entropy_backward, cross_entropy_parts
from tests.harness.op_checks import check_cross_entropy, cross_entropy_inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 513])
@pytest.mark.parametrize("width, first_id", [(1, 0), (5, 3), (64, 0), (257, 100), (5003, 0), (0, 12)])
def test_equals_the_twin(num_tokens, width, first_id, dtype):
    check_cross_entropy(num_tokens, width, first_id, num_tokens + width, dtype)


@given(st.integers(0, 40), st.integers(0, 300), st.integers(0, 50), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None, max_examples=60)
def test_equals_the_twin_for_any_shape(num_tokens, width, first_id, dtype):
    check_cross_entropy(num_tokens, width, first_id, 3, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_written_past_the_cache(dtype):
    check_cross_entropy(700, 16_384, 0, 1, dtype)


def test_equals_torchs_loss_and_gradient():
    logits_TV, labels_T, dloss_T = cross_entropy_inputs(33, 1001, 0, 2)
    labels_T = labels_T.clamp(max=1000)
    logits_TV.requires_grad_()
    loss_T = functional.cross_entropy(logits_TV, labels_T, reduction="none")
    (expected,) = torch.autograd.grad(loss_T, logits_TV, dloss_T)
    peak_T, sum_T, target_T = cross_entropy_parts(logits_TV, labels_T)
    torch.testing.assert_close(sum_T.log() + peak_T - target_T, loss_T.detach(), rtol=1e-6, atol=2e-6)
    got = cross_entropy_backward(logits_TV, labels_T, 0, sum_T.log() + peak_T, dloss_T)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)


def test_parts_of_the_vocabulary_join():
    logits_TV, labels_T, dloss_T = cross_entropy_inputs(40, 90, 0, 3)
    labels_T = labels_T.clamp(max=89)
    cuts = [(0, 30), (30, 30), (30, 77), (77, 90)]
    parts = [cross_entropy_parts(logits_TV[:, a:b], labels_T, a) for a, b in cuts]
    peak_T = torch.stack([part[0] for part in parts]).amax(0)
    sum_T = sum(part[1] * (part[0] - peak_T).exp() for part in parts)
    target_T = sum(part[2] for part in parts)
    loss_T = functional.cross_entropy(logits_TV, labels_T, reduction="none")
    torch.testing.assert_close(sum_T.log() + peak_T - target_T, loss_T, rtol=1e-6, atol=2e-6)
    lse_T = sum_T.log() + peak_T
    pieces = [cross_entropy_backward(logits_TV[:, a:b], labels_T, a, lse_T, dloss_T) for a, b in cuts]
    whole = cross_entropy_backward(logits_TV, labels_T, 0, lse_T, dloss_T)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-6, atol=1e-7)


def test_extreme_and_not_a_number_logits():
    logits_TV = torch.tensor([[1e4, -1e4, 0.0], [-torch.inf, 2.0, 1.0], [torch.nan, 0.0, 1.0], [3e38, 0.0, 1.0]])
    labels_T = torch.tensor([0, 1, 1, 0])
    peak_T, sum_T, target_T = cross_entropy_parts(logits_TV, labels_T)
    loss_T = sum_T.log() + peak_T - target_T
    expected = functional.cross_entropy(logits_TV, labels_T, reduction="none")
    assert loss_T[2].isnan() and expected[2].isnan()
    torch.testing.assert_close(loss_T[[0, 1, 3]], expected[[0, 1, 3]])


def test_double_goes_through_the_twin():
    logits_TV, labels_T, dloss_T = cross_entropy_inputs(9, 31, 0, 4, torch.float64)
    peak_T, sum_T, _ = cross_entropy_parts(logits_TV, labels_T)
    assert peak_T.dtype == sum_T.dtype == torch.float64
    lse_T = sum_T.log() + peak_T
    assert cross_entropy_backward(logits_TV, labels_T, 0, lse_T, dloss_T.double()).dtype == torch.float64


def test_bad_labels_are_refused():
    with pytest.raises(ValueError, match="one int64 a token"):
        cross_entropy_parts(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="one int64 a token"):
        cross_entropy_parts(torch.zeros(3, 4), torch.zeros(3))
