"""An MoE layer begins as strong as the dense MLP that it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.models.rank_model import build_model
from megatron_samoe.moe.branch_scale import branch_scale
from megatron_samoe.moe.scores import score_of
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state import single_process_state
from tests.harness.tables import table
from tests.harness.tiny import tiny_config

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


def dense_rms(**options: Any) -> float:
    return branch_rms("dense", ffn_hidden_size=256, **options)


@pytest.mark.parametrize("layout", ["moe", "samoe"])
@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("topk", [1, 2, 8])
@pytest.mark.parametrize("experts", [8, 64])
def test_an_moe_layer_begins_as_strong_as_the_dense_mlp(experts: int, topk: int, function: str, layout: str) -> None:
    routing = {"num_experts": experts, "moe_router_topk": topk, "moe_router_score_function": function}
    options = {"ffn_hidden_size": 256, **routing}
    dense = dense_rms()
    assert branch_rms(layout, **options) == pytest.approx(dense, rel=0.1)
    without = branch_rms(layout, **options, moe_scale_output_init=False)
    assert without < 0.92 * dense, "the MLP's own spread begins too weak"


@pytest.mark.parametrize("options", TABLE["models"])
def test_shared_experts_widths_and_routers_of_all_kinds(options: dict[str, Any]) -> None:
    style = {"style": options["style"]} if "style" in options else {}
    assert branch_rms("moe", ffn_hidden_size=256, **options) == pytest.approx(dense_rms(**style), rel=0.1)


def mean_squared_weights(num_experts: int, topk: int, score: Any, pre_softmax: bool, logit_std: float) -> float:
    moe = MoEConfig(moe_router_topk=topk, moe_router_score_function=score, moe_router_pre_softmax=pre_softmax)
    return score_of(moe).mean_squares(num_experts, logit_std)


def test_the_estimate_is_the_formula_where_that_is_known() -> None:
    assert mean_squared_weights(8, 1, "softmax", True, 0.0) == pytest.approx(1 / 64)
    assert mean_squared_weights(8, 4, "softmax", False, 0.0) == pytest.approx(1 / 4)
    assert mean_squared_weights(8, 1, "sigmoid", True, 0.0) == pytest.approx(1 / 4)
    # The square of the larger of two softmax scores of logits of standard deviation 1, by quadrature.
    d = torch.linspace(-12, 12, 200001, dtype=torch.float64)
    density = torch.exp(-d.square() / 4) / (4 * torch.pi) ** 0.5
    expected = torch.trapezoid(torch.sigmoid(d.abs()).square() * density, d).item()
    assert mean_squared_weights(2, 1, "softmax", True, 1.0) == pytest.approx(expected, rel=5e-3)


def test_a_switch_turns_it_off() -> None:
    assert branch_scale(tiny_config("moe", moe_scale_output_init=False), 4) == (1.0, 1.0)
