from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from megatron_samoe.ops import reference
from megatron_samoe.ops.permute import gather_rows, invert_index, make_permutation, permute, unpermute
from megatron_samoe.runtime.reference_checks import check_rows, random_ids
from tests.harness.op_checks import threads_of_torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 513])
@pytest.mark.parametrize("topk, num_experts, hidden", [(1, 4, 1), (2, 8, 17), (2, 64, 64), (8, 9, 100), (3, 5, 256)])
@pytest.mark.parametrize("drop", [False, True])
def test_equals_the_twin(num_tokens, topk, num_experts, hidden, drop, dtype):
    check_rows(random_ids(num_tokens, topk, num_experts, drop, num_tokens), num_experts, hidden, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_larger_than_the_cache(dtype):
    check_rows(random_ids(4100, 2, 8, True, 1), 8, 1104, dtype)


@pytest.mark.parametrize("expert", [0, 3, -1])
def test_all_tokens_to_one_expert_or_to_none(expert):
    ids_TK = torch.full((50, 1), expert)
    permutation = make_permutation(ids_TK, 4)
    assert permutation.num_rows == (0 if expert < 0 else 50)
    assert int(permutation.counts_E.sum()) == permutation.num_rows
    check_rows(ids_TK, 4, 32, torch.float32)


@given(
    num_experts=st.integers(1, 40),
    slots=st.lists(st.integers(-1, 39), max_size=200),
    topk=st.integers(1, 4),
)
@settings(deadline=None, max_examples=150)
def test_the_permutation_is_a_stable_sort(num_experts, slots, topk):
    slots = [slot if slot < num_experts else slot % num_experts for slot in slots][: len(slots) // topk * topk]
    permutation = make_permutation(torch.tensor(slots, dtype=torch.int64).view(-1, topk), num_experts)
    expected = [slot for expert in range(num_experts) for slot, id_ in enumerate(slots) if id_ == expert]
    assert permutation.slot_of_row_N.tolist() == expected
    assert permutation.counts_E.tolist() == [slots.count(expert) for expert in range(num_experts)]
    row_of_slot = [-1] * len(slots)
    for row, slot in enumerate(expected):
        row_of_slot[slot] = row
    assert permutation.row_of_slot_TK.flatten().tolist() == row_of_slot
    assert permutation.topk == topk


def test_a_large_permutation_cut_over_threads_equals_the_twin():
    ids_TK = random_ids(60_000, 2, 16, True, 2)
    for threads in (1, 2, 5):
        with threads_of_torch(threads):
            made = make_permutation(ids_TK, 16)
        found = made.slot_of_row_N, made.row_of_slot_TK, made.counts_E, made.ends_E
        assert all(map(torch.equal, found, reference.make_permutation(ids_TK, 16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gather_rows_and_its_inverse(dtype):
    generator = torch.Generator().manual_seed(0)
    x_RH = torch.randn(37, 12, generator=generator).to(dtype).requires_grad_()
    index_R = torch.randperm(37, generator=generator)
    y_RH = gather_rows(x_RH, index_R)
    assert torch.equal(y_RH, x_RH[index_R])
    assert torch.equal(gather_rows(y_RH, invert_index(index_R), index_R), x_RH)
    dy_RH = torch.randn(37, 12, generator=generator).to(dtype)
    assert torch.equal(torch.autograd.grad(y_RH, x_RH, dy_RH)[0][index_R], dy_RH)


def test_gradcheck_in_double():
    permutation = make_permutation(random_ids(6, 2, 4, True, 0), 4)
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(6, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    rows_NH = torch.randn(permutation.num_rows, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    probs_TK = torch.rand(6, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, permutation), x_TH)
    assert torch.autograd.gradcheck(lambda r, p: unpermute(r, p, permutation), (rows_NH, probs_TK))


def test_expanded_and_strided_tensors():
    permutation = make_permutation(random_ids(10, 2, 4, False, 0), 4)
    x_HT = torch.randn(8, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    probs_TK = torch.full((10, 2), 0.5)
    y_TH = unpermute(permute(x_HT.t(), permutation), probs_TK, permutation)
    y_TH.sum().backward()  # a stride-0 gradient
    torch.testing.assert_close(y_TH, x_HT.t())
    torch.testing.assert_close(x_HT.grad, torch.ones_like(x_HT))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_recompute(use_reentrant):
    permutation = make_permutation(random_ids(10, 2, 4, True, 0), 4)
    x_TH = torch.randn(10, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    probs_TK = torch.rand(10, 2, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def function(x, probs):
        return unpermute(permute(x, permutation) ** 2, probs, permutation)

    plain = torch.autograd.grad(function(x_TH, probs_TK).pow(2).sum(), (x_TH, probs_TK))
    again = torch.autograd.grad(function(x_TH, probs_TK).pow(2).sum(), (x_TH, probs_TK))
    checkpoint(function, x_TH, probs_TK, use_reentrant=use_reentrant).pow(2).sum().backward()
    assert torch.equal(x_TH.grad, plain[0]) and torch.equal(probs_TK.grad, plain[1])
    assert torch.equal(again[0], plain[0])


def test_bad_input_is_refused():
    permutation = make_permutation(torch.zeros(3, 1, dtype=torch.int64), 2)
    with pytest.raises((IndexError, RuntimeError), match=r"allowed are -1 to 1"):
        make_permutation(torch.tensor([[2]]), 2)
    with pytest.raises((IndexError, RuntimeError), match=r"allowed are -1 to 1"):
        make_permutation(torch.tensor([[-2]]), 2)
    with pytest.raises(ValueError, match="int64 matrix"):
        make_permutation(torch.zeros(3, 1), 2)
    with pytest.raises(ValueError, match="3 tokens"):
        permute(torch.zeros(4, 2), permutation)
    with pytest.raises(ValueError, match="3 rows"):
        unpermute(torch.zeros(4, 2), torch.zeros(3, 1), permutation)
    with pytest.raises(ValueError, match="probs_TK"):
        unpermute(torch.zeros(3, 2), torch.zeros(3, 2), permutation)
    with pytest.raises(ValueError, match="one int64 a row"):
        gather_rows(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))
