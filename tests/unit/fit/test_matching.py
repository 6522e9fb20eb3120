"""Renumbering changes no logit; what was shuffled is found again."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch

from megatron_samoe.config.sharing_map import TIED, parse_sharing
from megatron_samoe.convert.layer_experts import LayerExperts
from megatron_samoe.fit.assignment import assigned
from megatron_samoe.fit.calibration import calibrate
from megatron_samoe.fit.compress.fitting import pair_errors
from megatron_samoe.fit.compress.sharing_plan import chosen_map
from megatron_samoe.fit.matching import MatchedLayer, in_order, match
from megatron_samoe.fit.numbering import Numbering
from megatron_samoe.fit.shared_model import renumbered_model
from tests.harness.tiny import tiny_config
from tests.unit.convert.memory_source import MemorySource, load, logits, new_source
from tests.unit.fit.test_calibration import passes_of

CASES: dict[str, dict[str, Any]] = {
    "gpt3": {"moe_router_topk": 2},
    "llama": {"style": "llama", "moe_router_topk": 2},
    "biased": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_topk": 2},
    "norm": {"moe_router_score_function": "norm", "moe_layer_freq": "0110", "moe_router_topk": 2},
    "relu": {"moe_router_score_function": "relu", "style": "llama"},
    "shared expert": {"moe_shared_expert_intermediate_size": 16, "moe_router_topk": 2},
}


def made(**options: Any) -> MemorySource:
    return new_source(tiny_config("moe", **options))


def random_numbering(num_experts: int, ffn_size: int, seed: int) -> Numbering:
    generator = torch.Generator().manual_seed(seed)
    neurons = [torch.randperm(ffn_size, generator=generator) for _ in range(num_experts)]
    return Numbering(torch.randperm(num_experts, generator=generator), torch.stack(neurons))


def layers_of(source: MemorySource) -> list[MatchedLayer]:
    experts = LayerExperts(source)
    found = calibrate(load(source), passes_of(6), 16, 0)
    return [MatchedLayer(experts.weights(p), c) for p, c in zip(experts.layers, found, strict=True)]


def test_the_assignment_is_the_best() -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(60):
        n = int(torch.randint(1, 6, (), generator=generator))
        score = torch.randn(n, n, generator=generator)
        score = score if trial % 2 else score.round()  # with scores that are equal
        best = max(float(score[range(n), list(p)].sum()) for p in permutations(range(n)))
        columns = assigned(score)
        assert sorted(columns.tolist()) == list(range(n))
        assert float(score[range(n), columns].sum()) == pytest.approx(best, abs=1e-6)
    assert assigned(torch.zeros(5, 5)).tolist() == list(range(5))


@pytest.mark.parametrize("case", CASES)
def test_any_renumbering_changes_nothing(case: str) -> None:
    source = made(**CASES[case])
    experts = LayerExperts(source)
    width = experts.shape(experts.layers[0], "w2")[-1]
    numberings = {i: random_numbering(4, width, i) for i in range(len(experts.layers))}
    renumbered = renumbered_model(source, numberings)
    expected = logits(source)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(renumbered), expected, rtol=1e-5, atol=1e-5)
    name = f"layers.{experts.layers[0].index}.moe.experts.w1"
    assert not torch.equal(renumbered.read(name), source.read(name))


@pytest.mark.parametrize("case", ["gpt3", "llama"])
def test_matching_a_trained_model_changes_nothing(case: str) -> None:
    source = made(**CASES[case])
    found = match(layers_of(source), "swiglu" if case == "llama" else "gelu")
    assert any(not torch.equal(n.experts_E, torch.arange(4)) for n in found)
    renumbered = renumbered_model(source, dict(enumerate(found)))
    torch.testing.assert_close(logits(renumbered), logits(source), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["gpt3", "llama"])
def test_shuffled_experts_and_neurons_are_found(case: str) -> None:
    """Layer 2 has layer 0's experts in another order, slightly changed."""
    source = made(**CASES[case])
    activation = "swiglu" if case == "llama" else "gelu"
    layers = layers_of(source)
    hidden = random_numbering(4, layers[0].ffn_size, 5)
    generator = torch.Generator().manual_seed(1)
    shuffled = in_order(layers[0], hidden)
    noisy = shuffled.weights.map(lambda t: t + 1e-3 * torch.randn(t.shape, generator=generator))
    found = match([layers[0], replace(layers[1], weights=noisy)], activation)[1]
    again = in_order(replace(layers[1], weights=noisy), found)
    for (_, a), (_, b) in zip(again.weights.items(), layers[0].weights.items(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-2)
    assert torch.equal(hidden.experts_E[found.experts_E], torch.arange(4))
    experts_only = match([layers[0], replace(layers[1], weights=noisy)], activation, "experts")[1]
    assert torch.equal(experts_only.experts_E, found.experts_E)
    assert torch.equal(experts_only.neurons_EF, Numbering.of_experts(torch.arange(4), layers[0].ffn_size).neurons_EF)


def test_moments_follow_their_neurons() -> None:
    """What is calibrated and then renumbered is what a renumbered model would be calibrated to."""
    source = made(**CASES["gpt3"])
    layers = layers_of(source)
    numbers = random_numbering(4, layers[1].ffn_size, 3)
    again = calibrate(load(renumbered_model(source, {1: numbers})), passes_of(6), 16, 0)[1]
    moved = in_order(layers[1], numbers).calibration
    torch.testing.assert_close(moved.input_EDD, again.input_EDD, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(moved.hidden_ECC, again.hidden_ECC, rtol=1e-4, atol=1e-3)
    assert torch.equal(moved.tokens_E, again.tokens_E)


def test_a_planted_pair_of_layers_is_chosen() -> None:
    """Layer 2 has layer 1's experts, shuffled: of all pairs this one loses next to nothing, and the map has it share."""
    source = made(**CASES["gpt3"])
    numbers = random_numbering(4, source.weights["layers.1.moe.experts.w1"].shape[1], 2)
    for kind in ("w1", "b1", "w2", "b2"):
        copied = source.weights[f"layers.1.moe.experts.{kind}"]
        source.weights[f"layers.2.moe.experts.{kind}"] = numbers.applied(kind, copied)
    error_LL = pair_errors(layers_of(source), "gelu", TIED, "neurons")
    assert error_LL[1, 2] < 1e-6
    others = error_LL[torch.triu(torch.ones(4, 4), 1).bool()].sort().values[1:]
    assert others.min() > 0.01
    sources = parse_sharing(chosen_map(error_LL, 3, TIED), 4)
    assert [source.way.name for source in sources] == "own tied tied own".split()


def test_two_layers_are_matched_in_the_same_way_from_either_side() -> None:
    first, second, *_ = layers_of(made(num_experts=6, **CASES["gpt3"]))
    there, back = (match(pair, "gelu", "experts")[1].experts_E for pair in ([first, second], [second, first]))
    assert torch.equal(there[back], torch.arange(6))
