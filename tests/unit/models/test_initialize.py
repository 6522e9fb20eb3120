"""Initial weights: a function of name, index and seed, and of nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.config import PretrainConfig
from megatron_samoe.models.initialize import initialize_parameters
from megatron_samoe.models.rank_model import RankModel, build_model
from megatron_samoe.parallel_state import ParallelState, RankGrid, single_process_state
from megatron_samoe.training.checkpointing import model_state
from tests.harness.tiny import VOCAB_SIZE, state_of, tiny_config, with_options

MODELS: dict[str, dict[str, Any]] = {
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
@pytest.mark.parametrize("model", MODELS)
def test_every_rank_holds_its_part_of_the_one_process_weights_bit_for_bit(model: str, grid: RankGrid) -> None:
    config = with_options(tiny_config(**MODELS[model]), pipeline_model_parallel_size=grid.pp)
    whole = weights(tiny_config(**MODELS[model]), single_process_state())
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
    config = tiny_config("moe", **sizes, **spread)
    for name, p in weights(config, single_process_state()).items():
        if name.endswith(("bias", ".b1", ".b2")):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            std = 0.25 if name.endswith(("attention.output.weight", ".w2")) else 0.5
            assert abs(p.std().item() / std - 1) < 0.1, name
            assert abs(p.mean().item()) < 0.1 * std, name


def test_all_parameters_are_initialised() -> None:
    model = RankModel(tiny_config("samoe", qk_layernorm=True), VOCAB_SIZE, single_process_state(), torch.float32)
    named = model.global_parameters()
    with torch.no_grad():
        for p in named.values():
            p.fill_(torch.nan)
    initialize_parameters(named, single_process_state(), 1)
    assert all(torch.isfinite(p).all() for p in named.values())


def test_pool_and_coefficients_stay_in_single_precision() -> None:
    model = build_model(tiny_config("samoe", bf16=True), VOCAB_SIZE, single_process_state())
    for name, p in model.global_parameters().items():
        fp32 = name.startswith("expert_pool.") or name.endswith(("moe.combination", "router.weight"))
        assert p.dtype == (torch.float32 if fp32 else torch.bfloat16), name


def test_no_parameter_is_registered_twice() -> None:
    model = build_model(tiny_config("samoe"), VOCAB_SIZE, single_process_state())
    keys = list(model.state_dict())
    assert len(keys) == len(list(model.parameters())) == len(model.global_parameters())
    assert sum("bank" in key for key in keys) == 4
