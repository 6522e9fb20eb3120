"""What the first of two ranks holds and does, by options of the layout: shapes, orders and numbers that follow by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.config import PretrainConfig
from megatron_samoe.runtime.ranks import state_in_layout
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import train_step
from tests.harness.ranks import run_ranks
from tests.harness.tiny import VOCAB_SIZE, micro_batches, tiny_config

pytestmark = pytest.mark.distributed
#: Elements of the tiny model's smallest buffer of gradients; other sums over ranks are of fewer.
GRADIENTS = 3000


@dataclass
class Rank:
    """What a rank held and did in a step of 8 sequences of 16 tokens.

    Attributes:
        weights: shapes of its part by name.
        updated: elements that its optimizer updates.
        rows: tokens that entered its first layer, by micro-batch.
        order: F where its first layer ran forward, B where it had run backward, R where gradients began to be summed.
        calls: collectives of torch that it called, or began.
    """

    weights: dict[str, tuple[int, ...]]
    updated: int
    rows: list[int] = field(default_factory=list)
    order: str = ""
    calls: list[str] = field(default_factory=list)

    @property
    def layers(self) -> set[int]:
        return {int(name.split(".")[1]) for name in self.weights if name.startswith("layers.")}


def step(config: PretrainConfig) -> Rank:
    parallel = state_in_layout(config.parallel, torch.device("cpu"))
    setup = build_setup(config, VOCAB_SIZE, parallel)
    weights = {name: tuple(p.shape) for name, p in setup.model.global_parameters().items()}
    seen = Rank(weights, sum(piece.weight.numel() for piece in setup.buffers.pieces))
    first = next(m for chunk in setup.model.chunks for n, m in chunk.named_modules() if n.endswith("attention_norm"))

    def began(_module: Any, inputs: Any) -> None:
        seen.rows.append(len(inputs[0]))
        seen.order += "F"
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda _: setattr(seen, "order", seen.order + "B"))

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def calls(*args: Any, **kwargs: Any) -> Any:
            seen.calls.append(name + " begun" * bool(kwargs.get("async_op")))
            seen.order += "R" * (name == "all_reduce" and args[0].numel() >= GRADIENTS)
            return call(*args, **kwargs)

        return calls

    first.register_forward_pre_hook(began)
    for name in ("all_reduce", "all_to_all_single", "batch_isend_irecv"):
        setattr(dist, name, noted(name, getattr(dist, name)))
    train_step(setup, initial_state(setup), micro_batches(setup, 0))
    return seen


TP, PP, EP, CP = (f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "expert_model", "context"))
BACKEND = "moe_all_to_all_backend"
#: Option and its value: other options of a tiny model of 4 layers, and whether a rank shows the option's effect.
LAYOUTS: dict[tuple[str, Any], tuple[dict[str, Any], Callable[[Rank], bool]]] = {
    (TP, 2): ({}, lambda r: r.weights["layers.0.mlp.fc1.weight"] == (64, 32)),
    ("sequence_parallel", True): ({TP: 2}, lambda r: r.rows[0] == 2 * 16 // 2),
    (PP, 2): ({}, lambda r: r.layers == {0, 1}),
    ("num_layers_per_virtual_pipeline_stage", 1): ({PP: 2}, lambda r: r.layers == {0, 2}),
    ("pipeline_model_parallel_layout", "Ettt|tL"): ({PP: 2}, lambda r: r.layers == {0, 1, 2}),
    ("pipeline_schedule", "gpipe"): ({PP: 2}, lambda r: r.order.startswith("FFFFBBBB")),
    (CP, 2): ({}, lambda r: r.rows == [2 * 16 // 2] * 4),
    ("cp_comm_type", "a2a"): ({CP: 2}, lambda r: "all_to_all_single" in r.calls and "batch_isend_irecv" not in r.calls),
    (EP, 2): ({"layout": "moe"}, lambda r: r.weights["layers.0.moe.experts.w1"] == (2, 128, 32)),
    ("expert_tensor_parallel_size", 1): (
        {"layout": "moe", TP: 2},
        lambda r: r.weights["layers.0.moe.experts.w1"] == (4, 128, 32),
    ),
    ("samoe_pool_placement", "replicated"): (
        {"layout": "samoe"},
        lambda r: r.weights["expert_pool.bank.w1"] == (2, 4, 128, 32),
    ),
    ("overlap_grad_reduce", True): ({"ddp_bucket_size": 5000}, lambda r: "R" in r.order[: r.order.rindex("B")]),
    ("ddp_bucket_size", 5000): ({}, lambda r: r.order.count("R") > 5),
    (BACKEND, "torch"): ({"layout": "moe", EP: 2}, lambda r: r.calls.count("all_to_all_single") == 2 * 4 * (4 + 1)),
    ("moe_shared_expert_overlap", True): (
        {"layout": "moe", EP: 2, BACKEND: "torch", "moe_shared_expert_intermediate_size": 8},
        lambda r: "all_to_all_single begun" in r.calls,
    ),
    ("moe_dispatch_chunks", 2): (
        {"layout": "moe", EP: 2, BACKEND: "torch"},
        lambda r: sum("all_to_all" in call for call in r.calls) == 2 * 4 * (2 * 4 + 1),
    ),
}


@pytest.mark.parametrize(("option", "value"), LAYOUTS, ids=lambda v: str(v))
def test_the_first_rank_does_as_an_option_says(option: str, value: Any) -> None:
    others, shows = LAYOUTS[option, value]
    first, _ = run_ranks(step, 2, tiny_config(**{"layout": "dense", **others, option: value}))
    assert shows(first), first


def test_half_the_elements_are_updated_where_the_optimizer_is_shared() -> None:
    whole, shared = (
        run_ranks(step, 2, tiny_config("dense", use_distributed_optimizer=b))[0].updated for b in (False, True)
    )
    assert 0.4 * whole < shared < 0.6 * whole
