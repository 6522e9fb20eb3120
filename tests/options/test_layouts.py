"""What the first of two ranks holds and does, by options of the layout: shapes, orders and numbers that follow by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.config import PretrainConfig
from megatron_samoe.runtime.ranks import state_in_layout
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import train_step
from tests.harness.ranks import run_ranks
from tests.harness.tables import table
from tests.harness.tiny import VOCAB_SIZE, micro_batches, tiny_config
from tests.options.table import unlike

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

    weights: dict[str, list[int]]
    updated: int
    rows: list[int] = field(default_factory=list)
    order: str = ""
    calls: list[str] = field(default_factory=list)

    @property
    def layers(self) -> list[int]:
        return sorted({int(name.split(".")[1]) for name in self.weights if name.startswith("layers.")})

    @property
    def sums_overlap(self) -> bool:
        return "R" in self.order[: self.order.rindex("B")]

    @property
    def has_many_sums(self) -> bool:
        return self.order.count("R") > 5

    @property
    def exchanges(self) -> list[str]:
        return sorted({call.split()[0] for call in self.calls} - {"all_reduce"})

    @property
    def num_all_to_all(self) -> int:
        return sum("all_to_all" in call for call in self.calls)

    @property
    def begins_all_to_all(self) -> bool:
        return "all_to_all_single begun" in self.calls


def step(config: PretrainConfig) -> Rank:
    parallel = state_in_layout(config.parallel, torch.device("cpu"))
    setup = build_setup(config, VOCAB_SIZE, parallel)
    weights = {name: list(p.shape) for name, p in setup.model.global_parameters().items()}
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


#: An option's value, other options, and what a rank shows.
LAYOUTS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = table(
    str(Path(__file__).with_name("layouts.py")), tuples=False
)


@pytest.mark.parametrize("option", LAYOUTS)
def test_the_first_rank_does_as_an_option_says(option: str) -> None:
    value, others, shows = LAYOUTS[option]
    first, _ = run_ranks(step, 2, tiny_config(**{"layout": "dense", **others, option: value}))
    assert not unlike(first, shows), first


def test_half_the_elements_are_updated_where_the_optimizer_is_shared() -> None:
    whole, shared = (
        run_ranks(step, 2, tiny_config("dense", use_distributed_optimizer=b))[0].updated for b in (False, True)
    )
    assert 0.4 * whole < shared < 0.6 * whole
