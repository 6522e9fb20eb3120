"""torch's own checks of what ops say of themselves (schema, aliasing, shapes without storage), on real arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.ops import extension, schemas
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange import all_to_all
from megatron_samoe.row_exchange.all_to_all import all_to_all_rows
from tests.harness.op_checks import cross_entropy_inputs, expert_weights

pytestmark = pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")

IDS_TK = torch.tensor([[0, 1], [3, -1], [1, 2]])
LOGITS_TE = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def _rows() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    slot_of_row_N, row_of_slot_TK, *_ = torch.ops.megatron_samoe.make_permutation(IDS_TK, 4)
    return torch.randn(3, 5), torch.randn(5, 5), torch.rand(3, 2), slot_of_row_N, row_of_slot_TK


def _gate_gradient() -> tuple[Any, ...]:
    probs_TK, ids_TK, _, score_sum_GE, z_sum, logsumexp_T = torch.ops.megatron_samoe.topk_gate(
        LOGITS_TE, 2, True, False, 2
    )
    gradients = torch.rand_like(probs_TK), torch.rand_like(score_sum_GE), torch.rand_like(z_sum)
    return LOGITS_TE, logsumexp_T, probs_TK, ids_TK, *gradients, True, False, 2


def _combination() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 2, 4), torch.randn(4, 2, 8), torch.randn(3, 2, 8)


def _experts() -> tuple[Any, ...]:
    w = expert_weights(2, 4, 3, "swiglu", True, torch.float32).map(Tensor.detach)
    return torch.randn(5, 3), [2, 3], w.w1, w.w2, w.b1, w.b2


def _experts_gradient() -> tuple[Any, ...]:
    x, rows, w1, w2, b1, b2 = _experts()
    gradients = [torch.zeros_like(t) for t in (w1, w2, b1, b2)]
    return x, x, torch.randn(5, 8), rows, w1, w2, b1, True, *gradients


def _adamw() -> tuple[Any, ...]:
    masters = [torch.rand(5) for _ in range(4)]
    return masters[:1], [torch.zeros(5).bfloat16()], *([m] for m in masters[1:]), 0.1, 0.9, 0.95, 1e-8, 0.0, 1, 1.0


def _cross_entropy_gradient() -> tuple[Any, ...]:
    logits_TV, labels_T, dloss_T = cross_entropy_inputs(5, 20, 0, 0)
    return logits_TV, labels_T, 0, torch.ones(5), dloss_T


CALLS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "topk_gate": lambda: (LOGITS_TE, 2, True, False, 2),
    "topk_gate_backward": _gate_gradient,
    "make_permutation": lambda: (IDS_TK, 4),
    "permute": lambda: (_rows()[0], _rows()[3], 2),
    "unpermute": lambda: (_rows()[1], _rows()[2], _rows()[4]),
    "unpermute_backward": _rows,
    "combine_banks": _combination,
    "combine_banks_backward": lambda: (*_combination(), torch.zeros(4, 2, 8)),
    "swiglu": lambda: (torch.randn(3, 8),),
    "swiglu_backward": lambda: (torch.randn(3, 4), torch.randn(3, 8)),
    "cross_entropy_parts": lambda: _cross_entropy_gradient()[:3],
    "cross_entropy_backward": _cross_entropy_gradient,
    "grouped_mlp": lambda: (*_experts(), True, True),
    "grouped_mlp_backward": _experts_gradient,
    "adamw": _adamw,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_training_op_is_what_it_says(name: str) -> None:
    # How many rows a permutation has is in the data, so its fake result cannot be compared.
    checks = ("test_schema",) if name == "make_permutation" else ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.megatron_samoe, name).default, CALLS[name](), test_utils=checks)


def test_every_training_op_is_checked() -> None:
    names = list(schemas.SCHEMAS)
    assert set(CALLS) == set(names[1 : names.index("decode_linear")])


class _Echo:
    """An exchange with ranks that send what they get."""

    def exchange(self, x: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
        return x.clone()


def test_the_exchange_of_rows_is_what_it_says() -> None:
    group = Group("ep", (0, 1), 0, exchange=_Echo())  # type: ignore[arg-type]
    x = torch.randn(5, 3, requires_grad=True)
    all_to_all_rows(x, [2, 3], [2, 3], group)  # registers the op
    arguments = (x, [2, 3], [2, 3], all_to_all._key(group))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.megatron_samoe.all_to_all_rows.default, arguments, test_utils=checks)
