"""An MoE layer by a GPU's algorithms as one graph of torch.compile, on a CPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.ops import extension
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import micro_batch_context
from tests.harness.tiny import VOCAB_SIZE, tiny_config
from tests.harness.wait_figures import WAYS
from tools.benchmarks.gpu_budget import LaunchCounter, as_on_a_gpu


def gradients(way: str, backend: str | None) -> dict[str, Tensor]:
    """The layer's output, and the gradients of its input and of all weights."""
    config = tiny_config(style="llama", bf16=True, moe_router_topk=2, **WAYS[way])
    with as_on_a_gpu("cpu", by_kernels=True):
        setup = build_setup(config, VOCAB_SIZE, single_process_state())
        setup.model.begin_step()
        context = micro_batch_context(setup, initial_state(setup), 0)
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


@pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")
@pytest.mark.parametrize(("way", "backend"), [("moe", "aot_eager"), ("samoe", "eager"), ("tied", "eager")])
def test_a_layer_is_one_graph(way: str, backend: str) -> None:
    """torch's compiler of backward graphs (2.13) does not take gradients that are added to a slice of a shared set."""
    torch._dynamo.reset()
    expected, found = gradients(way, None), gradients(way, backend)
    assert len(expected) > 2 and any(t.any() for name, t in expected.items() if name.startswith("gradient"))
    for name, t in expected.items():
        assert torch.equal(found[name], t), name
