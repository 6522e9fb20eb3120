"""How often a GPU's host would wait for it: CPU tensors take a GPU's algorithms, and a counter looks on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.harness.host_waits import HostWaits, lies_on_host
from tests.harness.pairs import by_pairs
from tests.harness.wait_figures import STYLES, WAYS, figures

READS: dict[str, Callable[[torch.Tensor], object]] = {
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x[0].item(),
    "__int__": lambda x: int(x[0]),
    "__float__": lambda x: float(x[0]),
    "__bool__": lambda x: bool(x[0]),
    "cpu": lambda x: x.cpu().tolist(),
    "copy to the host": lambda x: x.to("cpu").tolist(),
    "copy to the device": lambda x: torch.arange(3).to(x.device),
    "bincount": lambda x: torch.bincount(x),
    "nonzero": lambda x: x.nonzero(),
    "index": lambda x: x[x > 1],
    "index_put_": lambda x: x.__setitem__(x > 1, x[:2] + 1),
    "repeat_interleave": lambda x: x.repeat_interleave(x),
    "masked_select": lambda x: x.masked_select(x > 1),
    "_local_scalar_dense": lambda x: torch.ops.aten._local_scalar_dense(x[0]),
}

BIASES = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}


@pytest.mark.parametrize("kind", READS)
def test_each_kind_of_wait_is_counted_once(kind: str) -> None:
    x = torch.tensor([1, 2, 3])
    with HostWaits() as waits:
        READS[kind](x)
    assert waits.counts == {kind: 1}


def test_what_waits_for_nothing_is_not_counted() -> None:
    x = torch.tensor([1, 2, 3])
    with HostWaits() as waits:
        x[x > 5] = 0  # a masked fill
        x.repeat_interleave(x, output_size=6).cumsum(0).to(x.device, torch.float32)
        host = torch.arange(4) + 1
        assert host.sum().item() == 10 and host[host > 2].tolist() == [3, 4]
        made = torch.zeros(3, device=x.device)
        assert lies_on_host(host[1:]) and not lies_on_host(made) and not lies_on_host(made + 1)
    assert not waits.counts


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


@pytest.mark.parametrize(
    "options",
    [
        {**BIASES, "moe_router_num_groups": 2, "moe_router_group_topk": 1},
        {"moe_shared_expert_intermediate_size": 16, "moe_z_loss_coeff": 0.01, "moe_input_jitter_eps": 0.05},
        {"eod_mask_loss": True, "recompute_granularity": "full"},
        {"moe_router_load_balancing_type": "seq_aux_loss", "hidden_dropout": 0.1},
    ],
    ids=["biases", "shared expert", "masked tokens", "dropout"],
)
def test_options_add_no_wait(options: dict[str, Any]) -> None:
    found = figures("moe", "gelu", **options)
    assert found.totals == (0, 0, 1), found


@pytest.mark.parametrize(
    "options",
    [
        {"moe_router_score_function": "relu"},
        {"moe_router_expert_choice": True, "moe_router_load_balancing_type": "none"},
    ],
    ids=["relu", "expert choice"],
)
def test_routers_with_few_choices_wait_for_their_number(options: dict[str, Any]) -> None:
    """Rows for all that a token might have chosen would be as many as all experts together have."""
    found = figures("moe", "gelu", **options)
    assert found.totals == (1, 0, 17), found
