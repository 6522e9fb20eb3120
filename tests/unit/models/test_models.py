"""Whole models: initial weights are a function of name, index and seed; recomputation; and options of attention and of
layers. That weights and training are the same in every layout and for any micro-batches is the parity table's matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.config import PretrainConfig
from megatron_samoe.models.layer_layout import all_layers
from megatron_samoe.models.rank_model import build_model
from megatron_samoe.parallel_state import ParallelState, single_process_state
from megatron_samoe.training.train_step import compute_gradients, micro_batch_context
from tests.harness.layout_training import MODELS, train
from tests.harness.tables import table
from tests.harness.tiny import VOCAB_SIZE, micro_batches, started, tiny_config

TABLE = table(__file__)


def weights(config: PretrainConfig, state: ParallelState) -> dict[str, Tensor]:
    model = build_model(config, VOCAB_SIZE, state)
    return {name: p for name, p in model.global_parameters().items()}


def test_weights_depend_on_seed_and_name() -> None:
    config = tiny_config("moe")
    first, same = weights(config, single_process_state()), weights(config, single_process_state())
    other = weights(tiny_config("moe", seed=4321), single_process_state())
    drawn = [n for n, p in first.items() if p.std() > 1e-4]
    assert len(drawn) > 20
    for name in drawn:
        assert torch.equal(first[name], same[name]) and not torch.equal(first[name], other[name])
    shapes: dict[Any, list[Tensor]] = {}
    for name in drawn:
        for twin in shapes.setdefault(first[name].shape, []):
            assert not torch.equal(first[name], twin), f"{name} repeats another parameter"
        shapes[first[name].shape].append(first[name])
    experts = first["layers.0.moe.experts.w1"]
    assert all(not torch.equal(experts[0], experts[e]) for e in range(1, 4)), "experts differ from each other"


def test_spread_of_every_kind_of_parameter() -> None:
    sizes = {"num_layers": 2, "hidden_size": 128, "make_vocab_size_divisible_by": 128}
    spread = {"init_method_std": 0.5, "moe_router_init_method_std": 0.5, "moe_scale_output_init": False}
    config = tiny_config("moe", **sizes, **spread, qk_layernorm=True)
    for name, p in weights(config, single_process_state()).items():
        if name.endswith(("bias", ".b1", ".b2")):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            std = 0.25 if name.endswith(("attention.output.weight", ".w2")) else 0.5
            assert abs(p.std().item() / std - 1) < 0.1, name
            assert abs(p.mean().item()) < 0.1 * std, name


def test_pool_and_coefficients_stay_in_single_precision() -> None:
    model = build_model(tiny_config("samoe", bf16=True), VOCAB_SIZE, single_process_state())
    for name, p in model.global_parameters().items():
        fp32 = name.startswith("expert_pool.") or name.endswith(("moe.combination", "router.weight"))
        assert p.dtype == (torch.float32 if fp32 else torch.bfloat16), name


def gradients(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[float, dict[str, Tensor]]:
    setup, state = started(tiny_config(**options), dtype)
    loss, *_ = compute_gradients(setup, state, micro_batches(setup, 0))
    return loss, {n: p.main_grad.clone() for n, p in setup.buffers.parameters.items()}


@pytest.mark.parametrize("model", TABLE["recomputed"], ids=["dense", "moe", "samoe step", "samoe layer"])
@pytest.mark.parametrize("recompute", TABLE["ways"], ids=["full", "full 2", "selective"])
def test_recomputation_gives_the_same_gradients_bit_for_bit(model: dict[str, Any], recompute: dict[str, Any]) -> None:
    loss, plain = gradients(**model)
    again, recomputed = gradients(**model, **recompute)
    assert loss == again
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name
        assert gradient.any() or "attention.qkv.bias" in name, name


def test_full_recomputation_keeps_less() -> None:
    kept = []
    for options in ({}, {"recompute_granularity": "full"}):
        setup, state = started(tiny_config("moe", hidden_dropout=0.1, **options))
        setup.model.begin_step()
        total = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal total
            total += t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            batch = micro_batches(setup, 0)[0]
            setup.model(batch["tokens"], micro_batch_context(setup, state, 0))
        kept.append(total)
    assert kept[1] < kept[0] / 4


@pytest.mark.parametrize("layout", ["moe", "samoe"])
def test_moe_layers_stand_where_the_frequency_says(layout: str) -> None:
    config = tiny_config(layout, moe_layer_freq="0010")
    assert [(p.index, p.moe_index) for p in all_layers(config)] == [(0, None), (1, None), (2, 0), (3, None)]
    (chunk,) = build_model(config, VOCAB_SIZE, single_process_state()).chunks
    assert [layer.is_moe for layer in chunk.layers.values()] == [False, False, True, False]
    assert [p.moe_index for p in all_layers(tiny_config("dense"))] == [None] * 4


#: The models of the parity table that differ from others in such options, and whether these learn something.
LEARN = dict.fromkeys(("sinks and cap", "olmoe", "all of attention", "latent", "latent plain"), True)
LEARN |= dict.fromkeys(("window", "granite", "neox", "off by one"), False)


@pytest.mark.parametrize("model", LEARN)
def test_each_has_an_effect_and_trains(model: str) -> None:
    kept = ("layout", "style", "init_method_std", "moe_router_topk", "optimizer", "lr")
    plain = train(tiny_config(**{k: v for k, v in MODELS[model].items() if k in kept}), torch.float64, steps=1)
    found = train(tiny_config(**MODELS[model]), torch.float64, steps=1)
    assert found["losses"][0] != pytest.approx(plain["losses"][0], rel=1e-6)
    learned = [n for n in found["gradients"] if n.endswith(".sinks") or "q_norm" in n or "kv_norm" in n]
    assert bool(learned) == LEARN[model]
    assert all(found["gradients"][n].abs().min() > 0 for n in learned)
