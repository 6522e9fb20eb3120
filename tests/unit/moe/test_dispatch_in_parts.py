"""A dispatch in parts takes the ops that a whole one takes. An exchange of one member brings rows back at once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_samoe.moe.alltoall_dispatcher import AllToAllDispatcher
from megatron_samoe.ops import extension
from megatron_samoe.parallel_state.state import Group, PendingRows
from tests.harness.host_waits import as_if_asynchronous


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


@pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")
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
