"""How combination coefficients begin, and that combined experts begin as spread as normal ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_samoe.convert.layer_experts import LayerExperts
from megatron_samoe.models.rank_model import build_model
from megatron_samoe.moe.sharing.coefficients import bank_std_factor, initial_coefficients, normalize_coefficients
from megatron_samoe.parallel_state import single_process_state
from tests.harness.tiny import VOCAB_SIZE, tiny_config
from tests.unit.convert.memory_source import logits, new_source


def start(normalization: str, **options: Any) -> list[list[float]]:
    config = tiny_config(samoe_normalization=normalization, **options).moe
    rows = [initial_coefficients(config, layer, 6) for layer in range(6)]
    return [[round(v, 6) for v in normalize_coefficients(row, normalization).tolist()] for row in rows]


@pytest.mark.parametrize("normalization", ["none", "l2"])
def test_one_hot_starts(normalization: str) -> None:
    one, two, three = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
    assert start(normalization, num_expert_banks=3) == [one, two, three, one, two, three]
    assert start(normalization, num_expert_banks=3, samoe_init="block") == [one, one, two, two, three, three]


def test_softmax_starts_nearly_one_hot() -> None:
    rows = start("softmax", num_expert_banks=3)
    assert rows[1] == [0.05, 0.9, 0.05] and rows[3] == [0.9, 0.05, 0.05]
    assert start("softmax", num_expert_banks=1) == [[1.0]] * 6


@pytest.mark.parametrize(("normalization", "value"), [("none", 0.5), ("l2", 0.5), ("softmax", 0.25)])
def test_uniform_start(normalization: str, value: float) -> None:
    assert start(normalization, num_expert_banks=4, samoe_init="uniform") == [[value] * 4] * 6


def test_uniform_start_has_noise_that_differs_by_layer() -> None:
    config = tiny_config(num_expert_banks=4, samoe_init="uniform")
    model = build_model(config, VOCAB_SIZE, single_process_state())
    coefficients = torch.stack([layer.moe.experts.coefficients.detach() for layer in model.moe_layers()])
    noise = coefficients - 0.5
    assert 0.003 < noise.std() < 0.03
    assert not torch.equal(coefficients[0], coefficients[1])


@pytest.mark.parametrize("normalization", ["none", "l2", "softmax"])
@pytest.mark.parametrize("init", ["cyclic", "block", "uniform"])
def test_combined_experts_begin_with_the_spread_of_normal_ones(normalization: str, init: str) -> None:
    sizes = {"moe_ffn_hidden_size": 256, "hidden_size": 64, "num_expert_banks": 3}
    config = tiny_config(**sizes, samoe_normalization=normalization, samoe_init=init, moe_scale_output_init=False)
    model = build_model(config, VOCAB_SIZE, single_process_state())
    pool = model.expert_pool["combined"]
    for name, std in (("w1", 0.02), ("w2", 0.02 / 8**0.5)):
        for layer in model.moe_layers():
            a_GP = normalize_coefficients(layer.moe.experts.coefficients.detach(), normalization)[
                0 if name == "w1" else 1
            ]
            weight = torch.einsum("p,p...->...", a_GP[0], pool.bank[name].detach())
            assert weight.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("banks", [1, 2, 5])
def test_bank_factor_undoes_the_norm_of_the_start(banks: int) -> None:
    for normalization, init in (("none", "cyclic"), ("none", "uniform"), ("softmax", "uniform"), ("softmax", "cyclic")):
        config = tiny_config(num_expert_banks=banks, samoe_normalization=normalization, samoe_init=init).moe
        row = normalize_coefficients(initial_coefficients(config, 0, 4), normalization)
        assert bank_std_factor(config) * row.norm().item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("normalization", ["none", "l2", "softmax"])
@pytest.mark.parametrize("granularity", ["layer", "expert"])
def test_factors_on_a_set_are_factors_whatever_becomes_of_banks(normalization: str, granularity: str) -> None:
    """Layers with the products, each as experts of its own, compute the same; so does what reads a layer's experts."""
    options = {"samoe_normalization": normalization, "samoe_granularity": granularity}
    scaled = new_source(tiny_config("moe", expert_sharing="scaled:combined,0,0,combined", **options))
    plain = new_source(tiny_config("moe", expert_sharing="combined,own,own,combined", **options))
    plain.weights |= {name: tensor for name, tensor in scaled.weights.items() if name in plain.weights}
    factors, read = {1: (2.0, 3.0), 2: (-0.5, 1.5)}, LayerExperts(scaled)
    for layer, (first, second) in factors.items():
        scaled.weights[f"layers.{layer}.moe.combination"] = torch.tensor([[[first]], [[second]]])
        for kind, factor in (("w1", first), ("b1", first), ("w2", second), ("b2", second)):
            product = factor * scaled.weights[f"expert_pool.set.0.{kind}"][0]
            plain.weights[f"layers.{layer}.moe.experts.{kind}"] = product
            torch.testing.assert_close(read.read(read.layers[layer], kind), product)
    torch.testing.assert_close(logits(scaled), logits(plain), rtol=1e-4, atol=1e-5)
