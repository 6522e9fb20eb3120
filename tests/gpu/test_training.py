"""A layer and whole training steps on a GPU against the CPU's slow twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.moe.moe_layer import MoELayer
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.training.setup import build_setup
from tests.harness.extension_off import without_extension
from tests.harness.layout_training import MODELS, assert_same, layout_config, train
from tests.harness.tiny import VOCAB_SIZE, tiny_config

# The GPU adds matrix products in another order than the CPU.
RTOL = 1e-4


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a function on the CPU without the compiled ops."""

    def run(function: Any, *args: Any) -> Any:
        with monkeypatch.context() as patch:
            without_extension(patch)
            return function(*args, device="cpu")

    return run


def layer_results(topk: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """The output, the input's gradient and the statistics of a model's first MoE layer."""
    config = tiny_config("moe", style="llama", moe_router_topk=topk, num_experts=6)
    setup = build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel, device), dtype)
    layer = next(module for module in setup.model.modules() if isinstance(module, MoELayer))
    generator = torch.Generator().manual_seed(1)
    x_TH, dy_TH = (torch.randn(64, config.model.hidden_size, generator=generator).to(device, dtype) for _ in range(2))
    y_TH, stats, _ = layer(x_TH.requires_grad_(), ForwardContext(batch_size=4), setup.model.lender)
    y_TH.backward(dy_TH)
    assert x_TH.grad is not None
    return [t.detach().cpu() for t in (y_TH, x_TH.grad, stats.sums["counts"].double())]


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, RTOL), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("topk", [1, 2, 6])
def test_a_layer(topk: int, dtype: torch.dtype, rtol: float, device: str, twins: Any) -> None:
    for got, expected in zip(layer_results(topk, dtype, device=device), twins(layer_results, topk, dtype), strict=True):
        assert got.dtype == expected.dtype and expected.abs().max() > 0
        torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


@pytest.mark.parametrize(
    "model", ["dense", "samoe step", "samoe layer", "moe top2 llama", "samoe many banks per expert"]
)
def test_training_steps(model: str, device: str, twins: Any) -> None:
    """Losses, norms and the first step's gradients; then the weights that the optimizer made of them."""
    assert model in MODELS
    config = layout_config("one process", model)
    got = train(config, torch.float32, 3, device=device)
    expected = twins(train, config, torch.float32, 3)
    assert_same(got, expected, rtol=RTOL)
    for name, weight in expected["weights"].items():
        # AdamW's first steps are the size of the rate whatever the gradient's: some are of rounding errors alone.
        close = torch.isclose(got["weights"][name], weight, rtol=RTOL, atol=1e-5)
        assert close.float().mean() > 0.99, name
