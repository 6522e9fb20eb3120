"""The ops of a device that runs behind the host, on CPU tensors: against their twins and the CPU's own path."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_samoe.ops import asynchronous, grouped_products
from megatron_samoe.ops.asynchronous import taken_for_gpu
from megatron_samoe.ops.grouped_mlp import grouped_mlp
from megatron_samoe.ops.grouped_products import ExpertRows, use_grouped_mm
from megatron_samoe.ops.permute import make_permutation, unpermute
from tests.harness.host_waits import as_if_asynchronous
from tests.harness.op_checks import check_grouped_mlp, expert_weights, grouped_mlp_reference, routed_rows
from tools.benchmarks.gpu_budget import LaunchCounter

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
    torch.testing.assert_close(y, grouped_mlp_reference(x, [4, 5, 11], weights, "gelu"), rtol=1e-5, atol=1e-6)


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
    [
        *(((major, 0), torch.bfloat16, major in (9, 10)) for major in (8, 9, 10, 12)),
        ((9, 0), torch.float32, False),
    ],
)
def test_torch_groups_products_on_some_devices(
    capability: tuple[int, int], dtype: torch.dtype, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would copy counts to the host. What torch says of the GPU is made up, and asked through its own function."""
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    with FakeTensorMode():
        x, w = torch.empty(5, 16, device="cuda", dtype=dtype), torch.empty(2, 8, 16, device="cuda", dtype=dtype)
        upright = torch.empty(2, 16, 8, device="cuda", dtype=dtype)
        assert use_grouped_mm(x, w.mT, 2) == use_grouped_mm(x, upright, 2) == fits
        assert not use_grouped_mm(x, w.mT, 1024), "too many experts"
        x, w = torch.empty(5, 15, device="cuda", dtype=dtype), torch.empty(2, 8, 15, device="cuda", dtype=dtype)
        assert not use_grouped_mm(x, w.mT, 2), "rows of 30 bytes"
        x, w = torch.empty(5, 16, dtype=dtype), torch.empty(2, 8, 16, dtype=dtype)
        assert not use_grouped_mm(x, w.mT, 2), "a CPU's"


def test_the_choice_is_made_within_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torch.compile, where the question about the device takes a lock as torch's own does."""
    lock = threading.Lock()

    def properties(device: torch.device) -> SimpleNamespace:
        with lock:
            return SimpleNamespace(major=9, minor=0)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(asynchronous.DEVICES, "value", {"cpu": torch.cuda.get_device_capability})
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph

    def backward(d_RM: Tensor, w_eMK: Tensor, counts_e: Tensor, grad_eMK: Tensor, x_RK: Tensor) -> Tensor:
        rows = ExpertRows(counts_e, len(d_RM))
        grouped_products.add_outer_products(grad_eMK, d_RM, x_RK, rows)
        return grouped_products.products(d_RM, rows, w_eMK.transpose(1, 2), None)

    torch._dynamo.reset()
    d_RM, x_RK, w_eMK = (torch.randn(shape).bfloat16() for shape in ((9, 16), (9, 24), (3, 16, 24)))
    counts_e, grads = torch.tensor([4, 0, 5]), [torch.zeros(3, 16, 24) for _ in range(2)]
    run = torch.compile(backward, fullgraph=True, backend=keep)
    found, expected = (f(d_RM, w_eMK, counts_e, g, x_RK) for f, g in zip((run, backward), grads, strict=True))
    assert torch.equal(found, expected) and torch.equal(*grads) and grads[0].any()
    assert len(graphs) == 1 and graphs[0].count("grouped_mm(") == 2 and "bmm(" not in graphs[0], graphs


def operands(draw: st.DrawFn, shape: list[int]) -> Tensor:
    """A tensor without storage that lies somehow in a larger one."""
    transposed, room, skipped = draw(st.booleans()), draw(st.sampled_from([0, 4, 8])), draw(st.sampled_from([0, 4, 8]))
    rows, columns = (-1, -2) if transposed else (-2, -1)
    *outer, height, width = *shape[:-2], shape[rows], shape[columns]
    wide = torch.empty(*outer, height, width + room + skipped, dtype=torch.bfloat16, device="meta")
    t = wide[..., skipped : skipped + width]
    return t.mT if transposed else t


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_what_is_taken_and_left_is_what_torch_takes_and_refuses(data: st.DataObject) -> None:
    """Torch's own check of a grouped product's operands, on tensors without storage, decides."""
    sizes = st.integers(1, 5).map(lambda n: 4 * n)
    rows, inner, outer, groups = (data.draw(sizes) for _ in range(4))
    if data.draw(st.booleans()):  # rows times matrices
        left, right = operands(data.draw, [rows, inner]), operands(data.draw, [groups, inner, outer])
    else:  # the outer product of rows, whose matrices lie as they came
        left, right = operands(data.draw, [inner, rows]), operands(data.draw, [rows, outer])
    try:
        torch._grouped_mm(left, right, offs=torch.empty(groups, dtype=torch.int32, device="meta"))
        takes = True
    except RuntimeError:
        takes = False
    # Torch asks for addresses on a device alone; a result whose rows have gaps is no use here.
    starts = [t.storage_offset() for t in (left, right)] + ([right.stride(0)] if right.dim() == 3 else [])
    takes = takes and all(n % 8 == 0 for n in (*starts, outer))
    with taken_for_gpu("meta"):
        assert use_grouped_mm(left, right, groups) == takes, (left.stride(), right.stride())


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_a_layer_in_bf16_copies_no_matrix_of_an_expert(activation: Any) -> None:
    """Forward and backward, with weights as they are and transposed: four grouped products and two of gradients."""
    weights = expert_weights(4, 24, 16, activation, activation == "gelu", torch.bfloat16)
    x = torch.randn(40, 16).bfloat16().requires_grad_()
    with as_if_asynchronous(), LaunchCounter() as counter:
        y = grouped_mlp(x, torch.tensor([5, 0, 17, 18]), weights, activation)
        y.backward(torch.ones_like(y))
    seen = [row["op"] for row in counter.rows]
    assert seen.count("_grouped_mm") == 6 and "bmm" not in seen, seen


@pytest.mark.parametrize("unset", [False, True])
def test_what_a_grouped_product_leaves_unset_reaches_no_gradient(unset: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in leaves the gradients of experts without rows as memory may have them; one row counts as no expert's."""
    counts_e = torch.tensor([2, 0, 3, 0])
    d_RM, x_RK = (torch.randint(-4, 5, (6, n)).bfloat16() for n in (8, 16))
    d_RM[5] = 0  # of a dropped slot: no gradient
    exact = torch.stack([d_RM[a:b].t() @ x_RK[a:b] for a, b in ((0, 2), (2, 2), (2, 5), (5, 6))])

    def grouped_mm(*_: Any, **__: Any) -> torch.Tensor:
        found = exact.clone()
        found[counts_e == 0] = torch.nan if unset else 0.0
        return found

    monkeypatch.setattr(grouped_products.F, "grouped_mm", grouped_mm)
    grads = torch.ones(4, 8, 16)
    with taken_for_gpu("cpu", (10, 0) if unset else (9, 0)):
        grouped_products.add_outer_products(grads, d_RM, x_RK, grouped_products.ExpertRows(counts_e, 6))
    assert torch.equal(grads, 1 + exact)
