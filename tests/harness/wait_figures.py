"""What `HostWaits` counts in a layer and in a training step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from megatron_samoe.parallel_state import ParallelState, initialize_model_parallel, single_process_state
from megatron_samoe.training.setup import TrainSetup, build_setup, initial_state
from megatron_samoe.training.train_step import micro_batch_context, train_step
from tests.harness.host_waits import HostWaits, as_if_asynchronous
from tests.harness.tiny import VOCAB_SIZE, micro_batches, tiny_config, with_layout, with_options

#: Ways of sharing, by the names that tests give them.
WAYS: dict[str, dict[str, Any]] = {
    "dense": {"layout": "dense"},
    "moe": {"layout": "moe"},
    "samoe": {"layout": "samoe", "samoe_combine": "step"},
    "samoe layer": {"layout": "samoe", "samoe_combine": "layer"},
    "tied": {"layout": "moe", "expert_sharing": "tied"},
    "pool": {"layout": "moe", "expert_sharing": "pool", "moe_router_score_function": "norm"},
}
#: GELU with bias, and SwiGLU without.
STYLES = {"gelu": "gpt3", "swiglu": "llama"}


@dataclass(frozen=True)
class Figures:
    """Waits by kind: of one MoE layer's forward and backward (none in a dense model), and of a whole step."""

    forward: Counter[str]
    backward: Counter[str]
    step: Counter[str]

    @property
    def totals(self) -> tuple[int, int, int]:
        return self.forward.total(), self.backward.total(), self.step.total()


def figures(way: str, style: str, grouped_products: bool = True, world: int = 1, **options: Any) -> Figures:
    """Returns the figures of a tiny model.

    Args:
        world: expert-parallel ranks, of which this is one.
        options: of the configuration, and of the layout.
    """
    config = tiny_config(style=STYLES[style], **{"moe_router_topk": 2, **WAYS[way], **options})
    parallel: ParallelState = single_process_state()
    if world > 1:
        config = with_options(with_layout(config, ep=world), **options)
        parallel = initialize_model_parallel(config.parallel)
    with as_if_asynchronous(grouped_products):
        setup = build_setup(config, VOCAB_SIZE, parallel)
        state = initial_state(setup)
        batches = micro_batches(setup, 0)
        setup.model.begin_step()
        forward, backward = _layer(setup) if setup.model.num_moe_layers else (Counter[str](), Counter[str]())
        with HostWaits() as waits:
            train_step(setup, state, batches)
        return Figures(forward, backward, waits.counts)


def _layer(setup: TrainSetup) -> tuple[Counter[str], Counter[str]]:
    context = micro_batch_context(setup, initial_state(setup), 0)
    tokens = context.batch_size * setup.config.model.seq_length
    x_TH = torch.randn(tokens, setup.config.model.hidden_size, requires_grad=True)
    layer, loads_BC = setup.model.moe_layers()[0].moe, None
    if setup.model.set_loads is not None:
        loads_BC = setup.model.set_loads.zeros(context.batch_size, x_TH)
    with HostWaits() as forward:
        y_TH, _, _ = layer(x_TH, context, setup.model.lender, loads_BC)
    with HostWaits() as backward:
        y_TH.backward(torch.ones_like(y_TH))
    return forward.counts, backward.counts
