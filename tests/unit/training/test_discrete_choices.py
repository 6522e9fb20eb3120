"""The helper that tells a tie from a fault where two runs differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.parallel_state import initialize_model_parallel
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import compute_gradients
from tests.harness.discrete_choices import Decision, Place, first_difference, recorded_choices, telling_ties
from tests.harness.tiny import VOCAB_SIZE, micro_batches, tiny_config

ROUTER, QKV = "layers.1.moe.router.weight", "layers.0.attention.qkv.weight"
#: Two experts of a layer score alike, but for rounding: one row of its router is the other.
TWINS: dict[str, Callable[[Tensor], Any]] = {ROUTER: lambda w: w[1].copy_(w[0])}


def decided(edits: dict[str, Callable[[Tensor], Any]], **options: Any) -> dict[Place, Decision]:
    """Returns what a model of changed weights decides for one global batch."""
    config = tiny_config("moe", num_layers=2, moe_router_topk=2, init_method_std=0.3, **options)
    setup = build_setup(config, VOCAB_SIZE, initialize_model_parallel(config.parallel))
    parameters = setup.model.global_parameters()
    with torch.no_grad():
        for name, edit in edits.items():
            edit(parameters[name])
    with recorded_choices() as choices:
        compute_gradients(setup, initial_state(setup), micro_batches(setup, 0))
    return choices.gathered(setup.parallel.world)


def after(first: dict[str, Callable[[Tensor], Any]], name: str, edit: Callable[[Tensor], Any]) -> dict[str, Any]:
    return {name: lambda w: (first.get(name, lambda _: None)(w), edit(w))}


def test_equal_runs_have_no_difference() -> None:
    one = decided({}, clip_qkv=0.5)
    assert first_difference(decided({}, clip_qkv=0.5), one) is None
    assert {what for *_, what in one} == {"expert choices", "clipped queries", "clipped keys", "clipped values"}
    # Eight sequences of 16 tokens, two layers: four experts, and 4 heads of 8 queries, keys and values.
    assert sum(d.taken.numel() for d in one.values()) == 8 * 16 * 2 * (4 + 3 * 32)
    clipped = torch.cat([d.taken.flatten() for (*_, what), d in one.items() if what != "expert choices"])
    assert 0.1 < clipped.float().mean() < 0.9


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "norm"])
def test_twins_that_change_places_are_a_tie(score: str) -> None:
    nudged = after(TWINS, ROUTER, lambda w: w[0].mul_(1 - 1e-6))
    other = after(TWINS, ROUTER, lambda w: w[0].mul_(1 + 1e-6))
    runs = [decided(edits, moe_router_score_function=score) for edits in (nudged, other)]
    difference = first_difference(*runs)
    assert difference is not None and difference.is_tie and difference.place[1] == 1, difference
    assert "a tie" in str(difference) and difference.total >= difference.number


@pytest.mark.parametrize("score", ["softmax", "norm", "relu"])
def test_a_router_that_computes_something_else_is_none(score: str) -> None:
    runs = [
        decided(edits, moe_router_score_function=score) for edits in ({}, {ROUTER: lambda w: w[2].add_(0.1 * w[3])})
    ]
    difference = first_difference(*runs)
    assert difference is not None and not difference.is_tie, difference
    assert difference.place[:2] == (0, 1) and difference.place[3] == "expert choices"


@pytest.mark.parametrize(("factor", "is_tie"), [(1 + 1e-6, True), (1.01, False)])
def test_a_value_at_the_clip_is_a_tie_and_others_are_none(factor: float, is_tie: bool) -> None:
    # Of the first layer, whose values no clip has changed.
    values = decided({}, clip_qkv=0.5)[0, 0, 3, "clipped queries"].compared.flatten()
    clip = values[(values - 0.5).abs().argmin()].item()
    runs = [decided(edits, clip_qkv=clip) for edits in ({}, {QKV: lambda w: w.mul_(factor)})]
    difference = first_difference(*runs)
    assert difference is not None and difference.is_tie == is_tie, difference
    assert difference.place[:2] == (0, 0) and difference.place[3].startswith("clipped")


def test_a_failed_comparison_says_which() -> None:
    runs = [decided(edits) for edits in ({}, {ROUTER: lambda w: w[2].neg_()})]
    with pytest.raises(AssertionError, match=r"(?s)losses differ.*first expert choices at step 0, layer 1,.*no tie"):
        with telling_ties(*runs):
            raise AssertionError("losses differ")
    with pytest.raises(AssertionError, match="every discrete choice is the same"), telling_ties(runs[0], runs[0]):
        raise AssertionError("losses differ")
    with telling_ties(*runs):
        pass
