from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_samoe.ops import reference
from megatron_samoe.ops.permute import gather_rows, invert_index, make_permutation, permute, unpermute
from megatron_samoe.runtime.reference_checks import check_rows, random_ids
from tests.harness.devices import DEVICES, on
from tests.harness.op_checks import threads_of_torch


@on(*DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "num_tokens, topk, num_experts, hidden",
    [(0, 2, 8, 17), (1, 1, 4, 1), (7, 8, 9, 100), (40, 3, 5, 256), (513, 2, 64, 64), (50, 8, 300, 1024)],
)
@pytest.mark.parametrize("drop", [False, True])
def test_equals_the_reference(device, num_tokens, topk, num_experts, hidden, drop, dtype):
    check_rows(random_ids(num_tokens, topk, num_experts, drop, num_tokens), num_experts, hidden, dtype, device)


@on(*DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("expert", [0, 3, -1])
def test_all_tokens_to_one_expert_or_to_none(device, expert, dtype):
    check_rows(torch.full((50, 1), expert), 4, 32, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_larger_than_the_cache(dtype):
    check_rows(random_ids(4100, 2, 8, True, 1), 8, 1104, dtype)


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


@on(*DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_rows_and_its_inverse(device, dtype):
    generator = torch.Generator().manual_seed(0)
    x_RH, dy_RH = (torch.randn(37, 12, generator=generator).to(device, dtype) for _ in range(2))
    index_R = torch.randperm(37, generator=generator).to(device)
    y_RH = gather_rows(x_RH.requires_grad_(), index_R)
    assert torch.equal(y_RH, x_RH[index_R])
    assert torch.equal(gather_rows(y_RH, invert_index(index_R), index_R), x_RH)
    assert torch.equal(torch.autograd.grad(y_RH, x_RH, dy_RH)[0][index_R], dy_RH)


def test_expanded_and_strided_tensors():
    permutation = make_permutation(random_ids(10, 2, 4, False, 0), 4)
    x_HT = torch.randn(8, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    probs_TK = torch.full((10, 2), 0.5)
    y_TH = unpermute(permute(x_HT.t(), permutation), probs_TK, permutation)
    y_TH.sum().backward()  # a stride-0 gradient
    torch.testing.assert_close(y_TH, x_HT.t())
    torch.testing.assert_close(x_HT.grad, torch.ones_like(x_HT))
