"""How often a GPU's host would wait for it: CPU tensors take a GPU's algorithms, and a counter looks on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.harness.host_waits import HostWaits, lies_on_host
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


LIMITS = {
    "gelu": {"dense": (0, 0, 2), "moe": (11, 6, 275), "pool": (13, 6, 307)},
    "swiglu": {"dense": (0, 0, 2), "moe": (7, 4, 179), "pool": (9, 4, 211)},
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("way", WAYS)
def test_waits_of_a_layer_and_of_a_step(way: str, style: str) -> None:
    """Forward, backward, and a step of four layers and four micro-batches."""
    limits = LIMITS[style].get(way, LIMITS[style]["moe"])
    found = figures(way, style)
    assert found.totals == limits, found
