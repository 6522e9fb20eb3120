"""Training by the algorithms of a device that runs behind the host, on CPU tensors, against the CPU's own."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from tests.harness.host_waits import as_if_asynchronous
from tests.harness.layout_training import train
from tests.harness.ranks import run_ranks
from tests.harness.tables import table
from tests.harness.tiny import tiny_config, with_layout, with_options
from tests.harness.wait_figures import WAYS

CASES: dict[str, dict[str, Any]] = WAYS | table(__file__)["cases"]


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("losses", "norms"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=0.0)
    for name in ("gradients", "weights"):
        for parameter, value in expected[name].items():
            torch.testing.assert_close(found[name][parameter], value, rtol=1e-9, atol=1e-12, msg=parameter)


@pytest.mark.parametrize("case", CASES)
def test_steps_equal_those_of_a_cpu(case: str) -> None:
    config = tiny_config(**{"layout": "moe", **CASES[case]})
    expected = train(config, torch.float64, steps=3)
    with as_if_asynchronous(grouped_products=False):
        found = train(config, torch.float64, steps=3)
    assert_same(found, expected)


def on_rank(asynchronous: bool, chunks: int) -> dict[str, Any]:
    options: dict[str, Any] = {"moe_shared_expert_intermediate_size": 16, "moe_expert_capacity_factor": 1.0}
    config = with_layout(tiny_config("samoe", moe_router_topk=2, **options), ep=2)
    if chunks > 1:
        config = with_options(config, moe_dispatch_chunks=chunks, moe_shared_expert_overlap=True)
    with as_if_asynchronous(grouped_products=False) if asynchronous else nullcontext():
        return train(config, torch.float64, steps=2)


@pytest.mark.distributed
@pytest.mark.parametrize("chunks", [1, 2])
def test_two_ranks_equal_two_of_a_cpu(chunks: int) -> None:
    expected, found = (run_ranks(on_rank, 2, asynchronous, chunks)[0] for asynchronous in (False, True))
    assert_same(found, expected)
