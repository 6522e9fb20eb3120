"""An MoE layer by a GPU's algorithms, on a CPU: where its host would wait, what it launches, and as one graph."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_samoe.moe.alltoall_dispatcher import AllToAllDispatcher
from megatron_samoe.ops import extension
from megatron_samoe.parallel_state.state import Group, PendingRows
from megatron_samoe.training.train_step import micro_batch_context
from tests.harness.host_waits import as_if_asynchronous
from tests.harness.pairs import by_pairs
from tests.harness.tables import table
from tests.harness.tiny import started, tiny_config
from tests.harness.wait_figures import STYLES, WAYS, figures
from tools.benchmarks.gpu_budget import GpuBudget, LaunchCounter, as_on_a_gpu
from tools.benchmarks.layer import Activation

TABLE = table(__file__)

CAPACITY: dict[str, Any] = {"moe_expert_capacity_factor": 1.0}


@pytest.mark.parametrize(
    ("way", "style", "options", "grouped_products"), by_pairs(WAYS, STYLES, ({}, CAPACITY), (True, False))
)
def test_a_layer_waits_for_nothing_and_a_step_once(
    way: str, style: str, options: dict[str, Any], grouped_products: bool
) -> None:
    """Four layers and four micro-batches; the step reads its losses, statistics and gradient norm together."""
    found = figures(way, style, grouped_products, **options)
    assert found.totals == (0, 0, 1), found


@pytest.mark.parametrize("options", TABLE["no wait"], ids=["biases", "shared expert", "masked tokens", "dropout"])
def test_options_add_no_wait(options: dict[str, Any]) -> None:
    found = figures("moe", "gelu", **options)
    assert found.totals == (0, 0, 1), found


@pytest.mark.parametrize("options", TABLE["few choices"], ids=["relu", "expert choice"])
def test_routers_with_few_choices_wait_for_their_number(options: dict[str, Any]) -> None:
    """Rows for all that a token might have chosen would be as many as all experts together have."""
    found = figures("moe", "gelu", **options)
    assert found.totals == (1, 0, 17), found


needs_library = pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")

#: Ops on numbers of a sequence or an expert: the balance loss and what a step reports.
OF_LOSSES = {"mul", "sum", "new_zeros", "full_like", "eq"}


@cache
def layer(activation: Activation) -> dict[str, LaunchCounter]:
    """Returns what a layer costs forward and backward, by our kernels."""
    return GpuBudget(activation=activation).count_layer(by_kernels=True)


def launches(counter: LaunchCounter, of_losses: bool) -> int:
    return sum(row["launches"] for row in counter.rows if (row["op"] in OF_LOSSES) == of_losses)


@needs_library
@pytest.mark.parametrize(("activation", "most"), [("swiglu", (12, 17)), ("gelu", (18, 28))])
def test_a_layers_launches(activation: Activation, most: tuple[int, int]) -> None:
    """From tokens to tokens, and back with all gradients; biases come with GELU."""
    counted = layer(activation)
    found = [launches(counter, of_losses=False) for counter in counted.values()]
    assert found[0] <= most[0] and found[1] <= most[1], {part: counter.rows for part, counter in counted.items()}
    assert all(launches(counter, of_losses=True) <= 6 for counter in counted.values())


@needs_library
def test_a_layers_bytes() -> None:
    """bf16 weights of 1,107 MB and rows of 67 MB: the backward's most are gradients, rounded to bf16 and added in fp32."""
    counted = layer("swiglu")
    weights = 64 * 3 * 2048 * 1408
    assert counted["forward"].num_bytes < 2 * weights + 0.79e9
    assert counted["backward"].num_bytes < (2 + 2 + 10) * weights + 1.6e9


def gradients(way: str, backend: str | None) -> dict[str, Tensor]:
    """The layer's output, and the gradients of its input and of all weights."""
    config = tiny_config(style="llama", bf16=True, moe_router_topk=2, **WAYS[way])
    with as_on_a_gpu("cpu", by_kernels=True):
        setup, state = started(config)
        setup.model.begin_step()
        context = micro_batch_context(setup, state, 0)
        tokens = context.batch_size * config.model.seq_length
        x_TH = torch.randn(tokens, config.model.hidden_size, generator=torch.Generator().manual_seed(3)).bfloat16()
        x_TH.requires_grad_()
        layer, lender = setup.model.moe_layers()[0].moe, setup.model.lender

        def forward(x_TH: Tensor) -> Tensor:
            y_TH: Tensor = layer(x_TH, context, lender, None)[0]
            return y_TH

        run: Any = torch.compile(forward, fullgraph=True, backend=backend) if backend else forward
        with nullcontext() if backend else LaunchCounter() as counter:
            y_TH = run(x_TH)
            y_TH.backward(torch.ones_like(y_TH))
        if counter is not None:
            assert [row["op"] for row in counter.rows].count("_grouped_mm") == 6, (
                "products of experts are torch's grouped ones"
            )
    assert x_TH.grad is not None
    flats = {f"gradient {i}": buffer.flat.clone() for i, buffer in enumerate(setup.buffers.buffers)}
    return {"y": y_TH.detach(), "dx": x_TH.grad, **flats}


@needs_library
@pytest.mark.parametrize(("way", "backend"), [("moe", "aot_eager"), ("samoe", "eager"), ("tied", "eager")])
def test_a_layer_is_one_graph(way: str, backend: str) -> None:
    """torch's compiler of backward graphs (2.13) does not take gradients that are added to a slice of a shared set."""
    torch._dynamo.reset()
    expected, found = gradients(way, None), gradients(way, backend)
    assert len(expected) > 2 and any(t.any() for name, t in expected.items() if name.startswith("gradient"))
    for name, t in expected.items():
        assert torch.equal(found[name], t), name


class _Loop:
    """The exchange of a group that is not there."""

    size = 1

    @property
    def exchange(self) -> _Loop:
        return self

    def check(self) -> None:
        pass

    def start(self, x: Tensor, send_rows: Any, receive_rows: Any, out: Tensor | None = None) -> PendingRows:
        assert sum(send_rows) == sum(receive_rows) == len(x)
        return PendingRows(x.clone() if out is None else out.copy_(x), lambda: None)


class _Seen(TorchDispatchMode):
    """Counts ops on rows."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_ours = func._schema.name.startswith("megatron_samoe::")
        if is_ours or (isinstance(args[0], Tensor) and args[0].is_floating_point()):  # indices are not rows
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def _round_trip(group: Any) -> tuple[list[Tensor], Counter[str]]:
    """The results and gradients of tokens that are doubled by the experts they chose, and the ops that ran."""
    generator = torch.Generator().manual_seed(1)
    x_TH = torch.randn(9, 5, generator=generator, requires_grad=True)
    probs_TK = torch.rand(9, 2, generator=generator, requires_grad=True)
    ids_TK = torch.randint(-1, 4, (9, 2), generator=generator)
    group_of_one: Group = group
    with _Seen() as seen:
        trip = AllToAllDispatcher(4, group_of_one, num_chunks=2).dispatch(x_TH, ids_TK)
        y_TH = trip.through(lambda rows_RH, _: 2 * rows_RH, probs_TK)
        y_TH.backward(torch.ones_like(y_TH))
    return [y_TH.detach(), *(t.grad for t in (x_TH, probs_TK) if t.grad is not None)], seen.counts


@needs_library
def test_trusted_kernels_move_all_rows() -> None:
    with as_if_asynchronous():
        with extension.trusting(["rows"]):
            found, ours = _round_trip(_Loop())
        expected, theirs = _round_trip(_Loop())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert len(found) == 3
    # Each part: tokens to rows, rows to experts and back; both ways but for what only travels.
    moves = {"permute": 10, "unpermute": 2, "unpermute_backward": 1, "make_permutation": 1}
    assert {name: ours[f"megatron_samoe::{name}"] for name in moves} == moves, ours
    assert not ours["aten::index_select"] and not ours["aten::index_add"], ours
    assert theirs["aten::index_select"], theirs
