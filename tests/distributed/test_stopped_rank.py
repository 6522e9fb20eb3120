"""Whatever gloo says to the ranks that wait for a stopped or lost one is known as a failure of communication."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.parallel_state.backend import is_communication_failure
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed

LIMIT = timedelta(milliseconds=500)


def operations(group: dist.ProcessGroup) -> dict[str, Callable[[], object]]:
    """Returns what a layout asks of gloo, each as a call that waits."""
    numbers, many = torch.ones(4), torch.ones(1 << 20)
    return {
        "all_reduce": lambda: dist.all_reduce(numbers, group=group),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty(4), numbers, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(torch.empty(2), numbers, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(torch.empty(8), numbers, group=group),
        "send": lambda: dist.send(many, 1, group=group),
        "isend": lambda: dist.isend(many, 1, group=group).wait(),  # type: ignore[union-attr]
        "recv": lambda: dist.recv(numbers, 1, group=group),
        "objects": lambda: dist.all_gather_object([None, None], 1, group=group),
        "barrier": lambda: dist.barrier(group=group),
    }


def without_a_peer(first: str, fate: str) -> list[tuple[str, bool, str]]:
    """Returns what operations, `first` before all, raise on rank 0, and whether it is known; rank 1 meets its fate."""
    group = dist.new_group([0, 1], timeout=LIMIT)
    dist.barrier()
    if dist.get_rank() == 1:
        if fate == "stopped":
            time.sleep(3)
        os._exit(7)
    calls = operations(group)
    pending = dist.irecv(torch.ones(4), 1, group=group)  # as a pipeline stage has one under way
    said = []
    for name in (first, *calls, "pending"):
        try:
            pending.wait() if name == "pending" else calls[name]()  # type: ignore[union-attr]
        except RuntimeError as error:
            said.append((name, is_communication_failure(error), str(error)))
    return said


@pytest.mark.parametrize(("first", "fate"), [("all_reduce", "stopped"), ("send", "stopped"), ("all_to_all", "lost")])
def test_what_waiting_ranks_hear_is_known(first: str, fate: str) -> None:
    said, left = run_ranks(without_a_peer, 2, first, fate, may_die=True)
    assert left == 7 and len(said) == 11, said
    assert all(known for _, known, _ in said), [message for _, known, message in said if not known]
    if fate == "stopped":
        assert any(message == "Application timeout caused pair closure" for *_, message in said), said
