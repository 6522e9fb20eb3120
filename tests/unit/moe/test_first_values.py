"""How layers with experts begin: as strong as the dense MLP that they stand for, with the spread of normal experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_samoe.convert.layer_experts import LayerExperts
from megatron_samoe.models.rank_model import build_model
from megatron_samoe.moe.branch_scale import branch_scale
from megatron_samoe.moe.sharing.coefficients import initial_coefficients, normalize_coefficients
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state import single_process_state
from tests.harness.tables import table
from tests.harness.tiny import VOCAB_SIZE, tiny_config
from tests.unit.convert.memory_source import logits, new_source

TABLE = table(__file__)
STATE = single_process_state()


def branch_rms(layout: str, **options: Any) -> float:
    """The root mean square of what the MLPs or MoE layers of a new model make of normalised tokens."""
    config = tiny_config(layout, num_layers=4, hidden_size=64, make_vocab_size_divisible_by=8, **options)
    model = build_model(config, 103, STATE)
    model.begin_step()
    x_TH = torch.randn(2048, 64, generator=torch.Generator().manual_seed(3))
    x_TH = x_TH / x_TH.square().mean(1, keepdim=True).sqrt()
    context, squares = ForwardContext(batch_size=1), []
    with torch.no_grad():
        for layer in model.chunks[0].layers.values():
            y_TH = layer.moe(x_TH, context, model.lender)[0] if layer.is_moe else layer.mlp(x_TH)
            squares.append(y_TH.square().mean().item())
    return (sum(squares) / len(squares)) ** 0.5


@pytest.mark.parametrize("layout", ["moe", "samoe"])
@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("topk", [1, 2, 8])
@pytest.mark.parametrize("experts", [8, 64])
def test_an_moe_layer_begins_as_strong_as_the_dense_mlp(experts: int, topk: int, function: str, layout: str) -> None:
    routing = {"num_experts": experts, "moe_router_topk": topk, "moe_router_score_function": function}
    options = {"ffn_hidden_size": 256, **routing}
    dense = branch_rms("dense", ffn_hidden_size=256)
    assert branch_rms(layout, **options) == pytest.approx(dense, rel=0.1)
    without = branch_rms(layout, **options, moe_scale_output_init=False)
    assert without < 0.92 * dense, "the MLP's own spread begins too weak"


@pytest.mark.parametrize("options", TABLE["models"])
def test_shared_experts_widths_and_routers_of_all_kinds(options: dict[str, Any]) -> None:
    style = {"style": options["style"]} if "style" in options else {}
    dense = branch_rms("dense", ffn_hidden_size=256, **style)
    assert branch_rms("moe", ffn_hidden_size=256, **options) == pytest.approx(dense, rel=0.1)


def test_a_switch_turns_it_off() -> None:
    assert branch_scale(tiny_config("moe", moe_scale_output_init=False), 4) == (1.0, 1.0)


def start(normalization: str, **options: Any) -> list[list[float]]:
    config = tiny_config(samoe_normalization=normalization, **options).moe
    rows = [initial_coefficients(config, layer, 6) for layer in range(6)]
    return [[round(v, 6) for v in normalize_coefficients(row, normalization).tolist()] for row in rows]


@pytest.mark.parametrize(("normalization", "options", "rows"), TABLE["starts"])
def test_starts(normalization: str, options: dict[str, Any], rows: list[tuple[float, ...]]) -> None:
    assert start(normalization, **options) == [list(row) for row in rows]


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
