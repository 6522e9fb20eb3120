"""Whole models: recomputation, grouping of micro-batches, layout of layers, document boundaries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_samoe.models.layer_layout import all_layers
from megatron_samoe.models.rank_model import build_model
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.training.setup import TrainSetup, build_setup, initial_state
from megatron_samoe.training.train_step import compute_gradients, micro_batch_context
from tests.harness.tiny import VOCAB_SIZE, global_batch, micro_batches, tiny_config

STATE = single_process_state()
NOISE = {"hidden_dropout": 0.2, "moe_input_jitter_eps": 0.1, "attention_dropout": 0.2}


def gradients(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[float, dict[str, Tensor], TrainSetup]:
    setup = build_setup(tiny_config(**options), VOCAB_SIZE, STATE, dtype)
    loss, *_ = compute_gradients(setup, initial_state(setup), micro_batches(setup, 0))
    return loss, {n: p.main_grad.clone() for n, p in setup.buffers.parameters.items()}, setup


@pytest.mark.parametrize(
    "model",
    [
        {"layout": "dense", **{k: v for k, v in NOISE.items() if "moe" not in k}},
        {"layout": "moe", "style": "llama", "moe_router_topk": 2, **NOISE},
        {"layout": "samoe", "samoe_combine": "step", "moe_expert_capacity_factor": 1.0, **NOISE},
        {"layout": "samoe", "samoe_combine": "layer", **NOISE},
    ],
    ids=["dense", "moe", "samoe step", "samoe layer"],
)
@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full"},
        {"recompute_granularity": "full", "recompute_num_layers": 2},
        {"recompute_granularity": "selective"},
    ],
    ids=["full", "full 2", "selective"],
)
def test_recomputation_gives_the_same_gradients_bit_for_bit(model: dict[str, Any], recompute: dict[str, Any]) -> None:
    loss, plain, _ = gradients(**model)
    again, recomputed, _ = gradients(**model, **recompute)
    assert loss == again
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name
        assert gradient.any() or "attention.qkv.bias" in name, name


def test_full_recomputation_keeps_less() -> None:
    kept = []
    for options in ({}, {"recompute_granularity": "full"}):
        setup = build_setup(tiny_config("moe", hidden_dropout=0.1, **options), VOCAB_SIZE, STATE)
        setup.model.begin_step()
        total = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal total
            total += t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            batch = micro_batches(setup, 0)[0]
            setup.model(batch["tokens"], micro_batch_context(setup, initial_state(setup), 0))
        kept.append(total)
    assert kept[1] < kept[0] / 4


def test_selective_recomputation_runs_attention_again_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"attention": 0, "mlp": 0}
    attend, activate = F.scaled_dot_product_attention, F.gelu

    def count_attention(*args: Any, **options: Any) -> Tensor:
        calls["attention"] += 1
        return attend(*args, **options)

    def count_mlp(*args: Any, **options: Any) -> Tensor:
        calls["mlp"] += 1
        return activate(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count_attention)
    monkeypatch.setattr(F, "gelu", count_mlp)
    for granularity, attention, mlp in ((None, 1, 1), ("selective", 2, 1), ("full", 2, 2)):
        calls.update(attention=0, mlp=0)
        gradients(layout="dense", recompute_granularity=granularity)
        assert calls == {"attention": 16 * attention, "mlp": 16 * mlp}, "4 layers, 4 micro-batches"


@pytest.mark.parametrize("layout", ["dense", "moe", "samoe"])
def test_grouping_into_micro_batches_does_not_change_the_gradient(layout: str) -> None:
    """With dropout, jitter, capacity and both losses: all noise belongs to the sample."""
    options: dict[str, Any] = {"layout": layout, "hidden_dropout": 0.2}
    if layout != "dense":
        options |= {"moe_input_jitter_eps": 0.1, "moe_expert_capacity_factor": 1.0, "moe_z_loss_coeff": 0.1}
    results = [gradients(torch.float64, micro_batch_size=size, **options) for size in (1, 2, 8)]
    for loss, other, _ in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-12)
        for name, gradient in results[0][1].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_gradient_is_that_of_the_mean_loss_and_the_weighted_auxiliary_losses() -> None:
    """One numerical derivative of the whole objective, through router and experts, against main gradients."""
    options = {"layout": "moe", "moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.2, "num_layers": 2}
    setup = build_setup(tiny_config(**options), VOCAB_SIZE, STATE, torch.float64)
    state = initial_state(setup)
    batches = micro_batches(setup, 0)

    def objective() -> float:
        loss, *_, routing = compute_gradients(setup, state, batches)
        assert routing is not None
        layers = 2  # the recorded losses are means over layers, the objective their sum
        return loss + (0.2 * routing.z_loss + 0.5 * routing.load_balance_loss) * layers

    objective()
    for name in ("layers.0.moe.router.weight", "layers.1.moe.experts.w1", "embedding.word.weight", "final_norm.weight"):
        p = setup.model.global_parameters()[name]
        direction = torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        objective()
        expected = float((p.main_grad * direction).sum())
        values = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                p.add_(direction, alpha=step)
            values.append(objective())
        with torch.no_grad():
            p.add_(direction, alpha=1e-5)
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(expected, rel=1e-4, abs=1e-8), name


@pytest.mark.parametrize("layout", ["moe", "samoe"])
def test_moe_layers_stand_where_the_frequency_says(layout: str) -> None:
    config = tiny_config(layout, moe_layer_freq="0110")
    assert [(p.index, p.moe_index) for p in all_layers(config)] == [(0, None), (1, 0), (2, 1), (3, None)]
    (chunk,) = build_model(config, VOCAB_SIZE, STATE).chunks
    assert [layer.is_moe for layer in chunk.layers.values()] == [False, True, True, False]
    assert [p.moe_index for p in all_layers(tiny_config("dense"))] == [None] * 4


@pytest.mark.parametrize("style", ["gpt3", "llama"])
def test_documents_in_one_sample_do_not_see_each_other(style: str) -> None:
    setup = build_setup(tiny_config("dense", style=style), VOCAB_SIZE, STATE, torch.float64)
    tokens = global_batch(setup.config, 0, 1)["tokens"]
    documents = torch.tensor([[0] * 6 + [1] * 10])
    positions = torch.cat((torch.arange(6), torch.arange(10)))[None]
    context = ForwardContext(1)
    with torch.no_grad():
        together, _ = setup.model(tokens, context, positions, documents)
        first, _ = setup.model(tokens[:, :6], context)
        second, _ = setup.model(tokens[:, 6:], context)
        torch.testing.assert_close(together, torch.cat((first, second)), rtol=1e-6, atol=1e-7)
        assert not torch.allclose(setup.model(tokens, context)[0][6:], second, rtol=1e-3)


def test_tied_and_untied_heads() -> None:
    for untied in (False, True):
        _, grads, setup = gradients(layout="dense", untie_embeddings_and_output_weights=untied)
        assert ("output.weight" in grads) == untied
        with torch.no_grad():
            setup.model.global_parameters()["embedding.word.weight"].zero_()
            logits, _ = setup.model(global_batch(setup.config, 0, 2)["tokens"], ForwardContext(2))
        assert logits[:, : setup.model.vocab_size].any() == untied
