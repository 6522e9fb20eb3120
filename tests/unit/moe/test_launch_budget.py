"""How many launches an MoE layer costs on a GPU, and how many bytes: counted on tensors without storage."""

from __future__ import annotations

from functools import cache

import pytest

from megatron_samoe.ops import extension
from tools.benchmarks.gpu_budget import GpuBudget, LaunchCounter
from tools.benchmarks.layer import Activation

pytestmark = pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")

#: Ops on numbers of a sequence or an expert: the balance loss and what a step reports.
OF_LOSSES = {"mul", "sum", "new_zeros", "full_like", "eq"}


@cache
def layer(activation: Activation) -> dict[str, LaunchCounter]:
    """Returns what a layer costs forward and backward, by our kernels."""
    return GpuBudget(activation=activation).count_layer(by_kernels=True)


def launches(counter: LaunchCounter, of_losses: bool) -> int:
    return sum(row["launches"] for row in counter.rows if (row["op"] in OF_LOSSES) == of_losses)


@pytest.mark.parametrize(("activation", "most"), [("swiglu", (12, 17)), ("gelu", (18, 28))])
def test_a_layers_launches(activation: Activation, most: tuple[int, int]) -> None:
    """From tokens to tokens, and back with all gradients; biases come with GELU."""
    counted = layer(activation)
    found = [launches(counter, of_losses=False) for counter in counted.values()]
    assert found[0] <= most[0] and found[1] <= most[1], {part: counter.rows for part, counter in counted.items()}
    assert all(launches(counter, of_losses=True) <= 6 for counter in counted.values())


def test_a_layers_bytes() -> None:
    """bf16 weights of 1,107 MB and rows of 67 MB: the backward's most are gradients, rounded to bf16 and added in fp32."""
    counted = layer("swiglu")
    weights = 64 * 3 * 2048 * 1408
    assert counted["forward"].num_bytes < 2 * weights + 0.79e9
    assert counted["backward"].num_bytes < (2 + 2 + 10) * weights + 1.6e9


@pytest.mark.night
def test_our_kernels_do_less_than_torch() -> None:
    ours, theirs = layer("swiglu"), GpuBudget().count_layer(by_kernels=False)
    for part in ours:
        assert ours[part].launches < 0.5 * theirs[part].launches
        assert ours[part].num_bytes < theirs[part].num_bytes
    pool = {part: counter for part, counter in GpuBudget().count_pool(by_kernels=True).items()}
    assert [counter.launches for counter in pool.values()] == [1, 2]
