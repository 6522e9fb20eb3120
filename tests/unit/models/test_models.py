"""Whole models: initial weights are a function of name, index and seed; recomputation; grouping into micro-batches; and options of
attention and of layers, whose training in every layout is the parity table's matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.config import PretrainConfig
from megatron_samoe.models.rank_model import build_model
from megatron_samoe.parallel_state import ParallelState, RankGrid, single_process_state
from megatron_samoe.training.checkpointing import model_state
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import compute_gradients, micro_batch_context
from tests.harness.layout_training import MODELS, train
from tests.harness.tiny import VOCAB_SIZE, micro_batches, state_of, tiny_config, with_options

SPREAD_OVER_RANKS: dict[str, dict[str, Any]] = {
    "dense": {"layout": "dense"},
    "moe": {"layout": "moe", "style": "llama", "moe_shared_expert_intermediate_size": 16},
    "samoe": {"layout": "samoe"},
    "samoe per expert": {"layout": "samoe", "style": "llama", "samoe_granularity": "expert", "samoe_init": "uniform"},
}


def weights(config: PretrainConfig, state: ParallelState) -> dict[str, Tensor]:
    model = build_model(config, VOCAB_SIZE, state)
    return {name: p for name, p in model.global_parameters().items()}


@pytest.mark.parametrize(
    "grid",
    [
        *(RankGrid(3), RankGrid(4, ep=4), RankGrid(4, tp=2, ep=4), RankGrid(4, pp=2, ep=2), RankGrid(8, pp=4, tp=2)),
        *(RankGrid(2, tp=2, etp=2), RankGrid(8, tp=2, ep=2, etp=2), RankGrid(8, pp=2, tp=2, ep=2, etp=2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("model", SPREAD_OVER_RANKS)
def test_every_rank_holds_its_part_of_the_one_process_weights_bit_for_bit(model: str, grid: RankGrid) -> None:
    config = with_options(tiny_config(**SPREAD_OVER_RANKS[model]), pipeline_model_parallel_size=grid.pp)
    whole = weights(tiny_config(**SPREAD_OVER_RANKS[model]), single_process_state())
    unseen = {name: torch.ones_like(p, dtype=torch.bool) for name, p in whole.items()}
    for rank in range(grid.world_size):
        built = build_model(config, VOCAB_SIZE, state_of(grid, rank))
        for name, parts in model_state(built).items():
            for part in parts:
                assert part.global_shape == tuple(whole[name].shape)
                place = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.local.shape, strict=True))
                assert torch.equal(part.local, whole[name][place]), f"{name} on rank {rank}"
                unseen[name][place] = False
    assert not any(mask.any() for mask in unseen.values()), "together the ranks hold everything"


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


STATE = single_process_state()
NOISE = {"hidden_dropout": 0.2, "moe_input_jitter_eps": 0.1, "attention_dropout": 0.2}


def gradients(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[float, dict[str, Tensor]]:
    setup = build_setup(tiny_config(**options), VOCAB_SIZE, STATE, dtype)
    loss, *_ = compute_gradients(setup, initial_state(setup), micro_batches(setup, 0))
    return loss, {n: p.main_grad.clone() for n, p in setup.buffers.parameters.items()}


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
    loss, plain = gradients(**model)
    again, recomputed = gradients(**model, **recompute)
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


@pytest.mark.parametrize("layout", ["dense", "moe", "samoe"])
def test_grouping_into_micro_batches_does_not_change_the_gradient(layout: str) -> None:
    """With dropout, jitter, capacity and both losses: all noise belongs to the sample."""
    options: dict[str, Any] = {"layout": layout, "hidden_dropout": 0.2}
    if layout != "dense":
        options |= {"moe_input_jitter_eps": 0.1, "moe_expert_capacity_factor": 1.0, "moe_z_loss_coeff": 0.1}
    results = [gradients(torch.float64, micro_batch_size=size, **options) for size in (1, 2, 8)]
    for loss, other in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-12)
        for name, gradient in results[0][1].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


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
