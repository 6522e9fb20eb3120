"""What a plain loop over tokens makes of the routers' choices is what calibration sums; renumbering changes no logit; what was
shuffled is found again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_samoe.config.sharing_map import TIED, parse_sharing
from megatron_samoe.convert.layer_experts import LayerExperts
from megatron_samoe.fit.assignment import assigned
from megatron_samoe.fit.calibration import LayerCalibration, calibrate, calibration_bytes, output_sums, own_experts
from megatron_samoe.fit.compress.fitting import pair_errors
from megatron_samoe.fit.compress.sharing_plan import chosen_map
from megatron_samoe.fit.matching import MatchedLayer, in_order, match
from megatron_samoe.fit.numbering import Numbering
from megatron_samoe.fit.shared_model import renumbered_model
from megatron_samoe.models.rank_model import RankModel
from megatron_samoe.moe.types import ForwardContext
from tests.harness.tables import table
from tests.harness.tiny import VOCAB_SIZE, tiny_config
from tests.unit.convert.memory_source import MemorySource, load, logits, new_source

TABLE = table(__file__)

STYLES: dict[str, dict[str, Any]] = TABLE["styles"]


def passes_of(count: int, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, VOCAB_SIZE, (count, 4, 17), generator=generator))


def expert(layer: Any, number: int, x_H: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what an expert makes of one token between its matrices and behind them, formula by formula."""
    p = dict(layer.moe.experts.named_parameters())
    if p["w1"].dim() == 4:
        gate, up = p["w1"][number] @ x_H
        a_F = F.silu(gate) * up
    else:
        a_F = F.gelu(p["w1"][number] @ x_H + p["b1"][number], approximate="tanh")
    y_H = p["w2"][number] @ a_F
    return a_F, y_H + p["b2"][number] if "b2" in p else y_H


@torch.no_grad()
def directly(model: RankModel, passes: Sequence[Tensor]) -> list[list[list[tuple[Tensor, Tensor, Tensor, float]]]]:
    """Returns (x, a, y, gate) of each token of each expert of each layer."""
    found: list[list[list]] = [[[] for _ in range(4)] for _ in model.moe_layers()]
    inputs: list[Tensor] = []
    hooks = [
        layer.moe.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in model.moe_layers()
    ]
    for ids in passes:
        model(ids[:, :-1], ForwardContext(batch_size=len(ids)))
    for hook in hooks:
        hook.remove()
    count = len(model.moe_layers())
    for number, x_TH in enumerate(inputs):
        layer = model.moe_layers()[number % count]
        routing = layer.moe.router(x_TH, ForwardContext(batch_size=4))
        for x_H, ids_K, gates_K in zip(x_TH, routing.ids_TK.tolist(), routing.probs_TK.tolist(), strict=True):
            for e, gate in zip(ids_K, gates_K, strict=True):
                found[number % count][e].append((x_H, *expert(layer, e, x_H), gate))
    return found


def with_one(rows: Sequence[Tensor], has_bias: bool) -> Tensor:
    stacked = torch.stack(list(rows))
    return torch.cat((stacked, torch.ones(len(stacked), 1)), 1) if has_bias else stacked


@pytest.mark.parametrize("style", STYLES)
def test_sums_are_those_of_a_plain_loop(style: str) -> None:
    model, passes = load(made(**STYLES[style])), passes_of(3)
    found = calibrate(model, passes, num_samples=5, seed=1)
    for calibration, experts in zip(found, directly(model, passes), strict=True):
        for e, tokens in enumerate(experts):
            assert calibration.tokens_E[e] == len(tokens)
            kept_x, kept_y = calibration.samples(e)
            assert len(kept_x) == min(5, len(tokens))
            if not tokens:
                assert not calibration.input_EDD[e].any() and calibration.mean_saliency_E[e] == 0
                continue
            xs, hidden, ys, gates = zip(*tokens, strict=True)
            for sums, rows in ((calibration.input_EDD, xs), (calibration.hidden_ECC, hidden)):
                rows = with_one(rows, style == "gpt3")
                torch.testing.assert_close(sums[e], rows.T @ rows, rtol=1e-4, atol=1e-4)
            saliency = sum(g * float(y.norm()) for g, y in zip(gates, ys, strict=True)) / len(tokens)
            assert float(calibration.mean_saliency_E[e]) == pytest.approx(saliency, rel=1e-5)
            for x, y in zip(kept_x, kept_y, strict=True):
                distance, which = (torch.stack(xs) - x).norm(dim=1).min(0)
                assert distance < 1e-5
                torch.testing.assert_close(y, ys[int(which)], rtol=1e-4, atol=1e-5)


def test_samples_are_a_fair_lot_and_stay_apart() -> None:
    """Over many seeds every token is kept as often, wherever it stands; none is kept twice."""
    kept = torch.zeros(40)
    x_NH = torch.arange(40.0)[:, None].repeat(1, 8)
    from megatron_samoe.moe.experts import ExpertShape

    for seed in range(200):
        lot = torch.Generator().manual_seed(seed)
        calibration = LayerCalibration.empty(ExpertShape(2, 8, 6, "gelu", True), 10)
        for part in x_NH.split(7):
            calibration.add(
                1, part, torch.zeros(len(part), 6), part, torch.ones(len(part)), torch.rand(len(part), generator=lot)
            )
        numbers = calibration.samples(1)[0][:, 0].long()
        assert len(numbers.unique()) == 10 and len(calibration.samples(0)[0]) == 0
        kept[numbers] += 1
    assert kept.sum() == 2000 and kept.min() > 25 and kept.max() < 80


def test_memory_is_what_the_sums_take() -> None:
    model = load(made(**CASES["gpt3"]))
    found = calibrate(model, passes_of(1), 6, 0)
    held = sum(t.nbytes for layer in found for t in vars(layer).values())
    assert calibration_bytes([layer.moe.shape for layer in model.moe_layers()], 6) == held


@pytest.mark.parametrize("style", STYLES)
def test_output_sums_are_those_of_a_plain_loop(style: str) -> None:
    model, other, passes = load(made(**STYLES[style])), load(made(**STYLES[style])), passes_of(2)
    with torch.no_grad():
        for layer in other.moe_layers():
            for parameter in layer.moe.experts.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)), alpha=0.1)
    new = [own_experts(layer.moe.experts) for layer in other.moe_layers()]
    found = output_sums(model, passes, new, "swiglu" if style == "llama" else "gelu")
    for number, (sums, experts) in enumerate(zip(found, directly(model, passes), strict=True)):
        for e, tokens in enumerate(experts):
            if tokens:
                ys = torch.stack([t[2] for t in tokens])
                with torch.no_grad():
                    b = with_one([expert(other.moe_layers()[number], e, t[0])[0] for t in tokens], style == "gpt3")
                torch.testing.assert_close(sums.hidden_ECC[e], b.T @ b, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(sums.cross_EHC[e], ys.T @ b, rtol=1e-4, atol=1e-4)
                assert float(sums.power_E[e]) == pytest.approx(float(ys.square().sum()), rel=1e-4)


CASES: dict[str, dict[str, Any]] = TABLE["models"]


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
