"""The ops of a device that runs behind the host, on CPU tensors: against their twins and the CPU's own path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_samoe.ops import grouped_products
from megatron_samoe.ops.grouped_mlp import grouped_mlp
from megatron_samoe.ops.grouped_products import ExpertRows
from megatron_samoe.ops.permute import gather_rows, make_permutation, unpermute
from megatron_samoe.ops.twin_checks import (
    check_grouped_mlp,
    check_rows,
    expert_weights,
    grouped_mlp_twin,
    random_ids,
    routed_rows,
)
from tests.harness.host_waits import as_if_asynchronous

SIZES = [[3], [0, 0, 40], [5, 0, 17, 1], routed_rows(90, 2, 8, 3), [700, 2, 0], [0, 0], [600, 600, 1]]


@pytest.fixture(params=[True, False], ids=["grouped", "blocks"])
def grouped(request: pytest.FixtureRequest) -> Iterator[bool]:
    """A device that runs behind the host, with torch's grouped product or without."""
    with as_if_asynchronous(request.param):
        yield request.param


@pytest.mark.parametrize("main_grads", [False, True])
@pytest.mark.parametrize(("activation", "bias"), [("gelu", True), ("swiglu", False), ("swiglu", True)])
@pytest.mark.parametrize("rows", SIZES, ids=str)
def test_experts_equal_the_twin(grouped: bool, rows: list[int], activation: Any, bias: bool, main_grads: bool) -> None:
    torch.manual_seed(len(rows))
    check_grouped_mlp(rows, 24, 16, activation, bias, torch.float32, 1e-6 if sum(rows) < 100 else 3e-6, main_grads)
    check_grouped_mlp(rows, 24, 16, activation, bias, torch.bfloat16, 0.02, main_grads)


def test_wide_matrices_are_copied_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_products, "_CHUNK_ELEMENTS", 3 * 24 * 16)
    with as_if_asynchronous(grouped_products=False):
        check_grouped_mlp([5, 0, 17, 1, 90], 24, 16, "gelu", True, torch.float32, 1e-6, main_grads=True)


def test_weight_gradients_of_fp64_are_exact(grouped: bool) -> None:
    if not grouped:  # torch has no grouped product of fp64
        check_grouped_mlp([5, 0, 17, 1], 24, 16, "swiglu", True, torch.float64, 1e-13, main_grads=True)


def test_rows_that_nobody_counts_are_the_last_experts(grouped: bool) -> None:
    torch.manual_seed(2)
    weights = expert_weights(3, 24, 16, "gelu", True, torch.float32)
    x = torch.randn(20, 16)
    y = grouped_mlp(x, torch.tensor([4, 5, 3]), weights, "gelu")
    torch.testing.assert_close(y, grouped_mlp_twin(x, [4, 5, 11], weights, "gelu"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_experts", [1, 3, 40])
def test_blocks_have_a_place_for_every_row(num_experts: int) -> None:
    generator = torch.Generator().manual_seed(num_experts)
    for total in (1, 15, 300, 5000):
        ids = torch.randint(0, num_experts, (total,), generator=generator)
        ids[: total // 2] = num_experts // 2
        counts = torch.bincount(ids, minlength=num_experts)
        blocks = ExpertRows(counts, total).blocks
        places = blocks.place_of_row_R
        assert torch.equal(blocks.row_of_place.flatten()[places], torch.arange(total, dtype=torch.int32))
        assert blocks.is_filled.flatten()[places].all() and blocks.is_filled.sum() == total
        expert_of_place = blocks.expert_of_block_b[:, None].expand_as(blocks.is_filled).flatten()
        assert torch.equal(expert_of_place[places], torch.arange(num_experts).repeat_interleave(counts))


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize(("num_tokens", "topk", "num_experts"), [(1, 1, 1), (7, 2, 3), (40, 3, 8), (0, 2, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_equal_the_twins(num_tokens: int, topk: int, num_experts: int, drop: bool, dtype: torch.dtype) -> None:
    with as_if_asynchronous():
        check_rows(random_ids(num_tokens, topk, num_experts, drop, 3), num_experts, 12, dtype)


def test_all_slots_may_be_dropped() -> None:
    with as_if_asynchronous():
        check_rows(torch.full((5, 2), -1), 3, 4, torch.float32)


def test_a_bijective_gather_goes_back_by_its_inverse() -> None:
    index_R = torch.tensor([2, 0, 1])
    x = torch.randn(3, 4, requires_grad=True)
    dy = torch.randn(3, 4)
    with as_if_asynchronous():
        y = gather_rows(x, index_R)
        (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(y, x[index_R]) and torch.equal(dx[index_R], dy)


def test_a_token_sums_its_rows_in_the_order_of_its_choices() -> None:
    """As the CPU's compiled op does: the bits do not depend on which expert comes first."""
    ids_TK = torch.tensor([[2, 0, 1], [0, 1, 2]])
    probs = torch.ones(2, 3)
    values = torch.tensor([1e8, 1.0, -1e8])
    with as_if_asynchronous():
        permutation = make_permutation(ids_TK, 3)
        rows = values[permutation.slot_of_row_N % 3][:, None]
        assert unpermute(rows, probs, permutation).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize(
    ("capability", "dtype", "fits"),
    [((9, 0), torch.bfloat16, True), ((10, 0), torch.bfloat16, True), ((8, 0), torch.bfloat16, False),
     ((12, 0), torch.bfloat16, False), ((9, 0), torch.float32, False)],
)  # fmt: skip
def test_torch_groups_products_on_some_devices(capability: tuple[int, int], dtype: torch.dtype, fits: bool) -> None:
    """The others would copy counts to the host."""
    with (
        FakeTensorMode(),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: capability),
        mock.patch.object(Tensor, "data_ptr", lambda t: 0),
    ):
        x, w = torch.empty(5, 16, device="cuda", dtype=dtype), torch.empty(2, 8, 16, device="cuda", dtype=dtype)
        assert grouped_products.use_grouped_mm(x, w) == fits
        x, w = torch.empty(5, 15, device="cuda", dtype=dtype), torch.empty(2, 8, 15, device="cuda", dtype=dtype)
        assert not grouped_products.use_grouped_mm(x, w), "rows of 30 bytes"


@pytest.mark.parametrize("unset", [False, True])
def test_what_a_grouped_product_leaves_unset_reaches_no_gradient(unset: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in leaves the gradients of experts without rows as memory may have them; one row counts as no expert's."""
    counts_e = torch.tensor([2, 0, 3, 0])
    d_RM, x_RK = torch.randn(6, 8), torch.randn(6, 16)
    d_RM[5] = 0  # of a dropped slot: no gradient
    exact = torch.stack([d_RM[a:b].t() @ x_RK[a:b] for a, b in ((0, 2), (2, 2), (2, 5), (5, 6))])

    def grouped_mm(*_: Any, **__: Any) -> torch.Tensor:
        found = exact.clone()
        found[counts_e == 0] = torch.nan if unset else 0.0
        return found

    monkeypatch.setattr(grouped_products, "use_grouped_mm", lambda *_: True)
    monkeypatch.setattr(grouped_products, "_leaves_empty_experts_unset", lambda _: unset)
    monkeypatch.setattr(grouped_products.F, "grouped_mm", grouped_mm)
    grads = torch.ones(4, 8, 16)
    grouped_products.add_outer_products(grads, d_RM, x_RK, grouped_products.ExpertRows(counts_e, 6))
    assert torch.equal(grads, 1 + exact)
