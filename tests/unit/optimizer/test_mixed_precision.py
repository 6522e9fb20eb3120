"""AdamW's master weights, bias correction, groups and loss scale; norms of gradients; learning rates."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megatron_samoe.config import OptimizerConfig, TrainingConfig
from megatron_samoe.distributed.grad_buffer import GradBuffers
from megatron_samoe.errors import ConfigError
from megatron_samoe.models.rank_model import RankModel
from megatron_samoe.optimizer.clip_grads import global_grad_norm
from megatron_samoe.optimizer.mixed_precision import LossScale, MixedPrecisionOptimizer
from megatron_samoe.optimizer.param_groups import build_param_groups, refuse_idle_patterns
from megatron_samoe.optimizer.schedule import learning_rate
from megatron_samoe.parallel_state import ParameterTag, set_tag, single_process_state
from tests.harness.tiny import VOCAB_SIZE, tiny_config

STATE = single_process_state()
CONFIG = OptimizerConfig(weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.9, adam_eps=1e-6)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"layers.0.mlp.fc1.weight": (5, 3), "layers.0.mlp.fc1.bias": (5,), "layers.0.moe.combination": (2, 1, 3)}
    made = {}
    for name, shape in shapes.items():
        own = torch.float32 if name.endswith("combination") else dtype
        made[name] = set_tag(nn.Parameter(torch.randn(shape, generator=generator).to(own)), ParameterTag())
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_masters_that_small_steps_move(dtype: torch.dtype) -> None:
    named = parameters(dtype)
    buffers = GradBuffers(named, STATE)
    optimizer = MixedPrecisionOptimizer(buffers, replace(CONFIG, weight_decay=0.0))
    assert set(optimizer.own_masters()) == {"layers.0.mlp.fc1.weight", "layers.0.mlp.fc1.bias"}
    weight = named["layers.0.mlp.fc1.weight"]
    master = optimizer.masters["layers.0.mlp.fc1.weight"]
    before, begun = weight.detach().clone(), master.clone()
    for _ in range(3):
        weight.main_grad.fill_(1.0)
        optimizer.step(1e-6)
        assert torch.equal(weight, master.to(dtype))
    assert torch.equal(weight, before), "three millionths are lost in half precision"
    torch.testing.assert_close(master, begun - 3e-6, rtol=0, atol=8e-7)
    assert weight.main_grad.dtype == torch.float32
    for _ in range(100):
        optimizer.step(1e-2)
    assert not torch.equal(weight, before)


def test_apex_that_is_demanded_and_absent_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--optimizer-backend = 'apex'.*not importable"):
        MixedPrecisionOptimizer(GradBuffers(parameters(), STATE), replace(CONFIG, optimizer_backend="apex"))


@pytest.mark.parametrize(
    "options",
    [
        *({"layout": layout} for layout in ("dense", "moe", "samoe")),
        {"layout": "moe", "expert_sharing": "pool", "num_experts": 8, "moe_router_score_function": "norm"},
    ],
)
def test_matrices_decay_and_nothing_else(options: dict[str, Any]) -> None:
    config = tiny_config(**options, qk_layernorm=True)
    model = RankModel(config, VOCAB_SIZE, single_process_state("meta"), torch.float32)
    named = model.global_parameters()
    rates = {
        "samoe_coefficient_lr_mult": 5.0,
        "moe_router_lr_mult": 7.0,
        "samoe_bank_lr_mult": 11.0,
        "moe_output_lr_mult": 13.0,
        "moe_expert_lr_mult": 17.0,
    }
    groups = build_param_groups(named, replace(CONFIG, **rates))
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(named), "each parameter is in one group"
    for group in groups:
        for name in group.names:
            vector = name.endswith(("bias", ".b1", ".b2", ".router.scale")) or "norm." in name
            coefficient = name.endswith("moe.combination")
            assert group.weight_decay == (0.0 if vector or coefficient else 0.3), name
            expected = 5.0 if coefficient else 7.0 if ".moe.router." in name else 1.0
            expected *= 11.0 if name.startswith("expert_pool.") else 1.0
            expected *= 17.0 if name.startswith("expert_pool.") or ".moe.experts." in name else 1.0
            expected *= 13.0 if name.endswith(("bank.w2", "experts.w2", "set.0.w2")) else 1.0
            assert group.lr_mult == expected, name


def test_ranks_with_other_layers_have_groups_in_the_same_order() -> None:
    """They exchange what they share group by group."""
    shared = ["expert_pool.bank.w1", "expert_pool.bank.w2"]
    config = OptimizerConfig(optimizer="muon", moe_output_lr_mult=0.5, lr_mult_patterns=(r"layers\.0\.=0.5",))

    def of_shared(layer: int) -> list[tuple[str, ...]]:
        groups = build_param_groups([f"layers.{layer}.attention.output.weight", *shared], config)
        return [names for group in groups if (names := tuple(n for n in group.names if n in shared))]

    assert of_shared(0) == of_shared(1) and len(of_shared(0)) == 2


def test_a_pattern_that_matches_nothing_is_named() -> None:
    config = replace(CONFIG, lr_mult_patterns=("fc1=2", "fc3=2"))
    with pytest.raises(ConfigError, match=r"--lr-mult-patterns = 'fc3=2': matches no parameter"):
        refuse_idle_patterns(parameters(), config, STATE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_scaling_in_the_step_is_scaling_before_it(engine: str, dtype: torch.dtype) -> None:
    steps = {}
    for way in ("within", "before"):
        named = parameters(dtype)
        buffers = GradBuffers(named, STATE)
        optimizer = MixedPrecisionOptimizer(buffers, replace(CONFIG, optimizer_backend=engine))
        torch.manual_seed(7)
        for _ in range(3):
            for buffer in buffers.buffers:
                buffer.flat.normal_()
            if way == "before":
                buffers.scale(0.3)
            optimizer.step(0.1, *([0.3] if way == "within" else []))
        steps[way] = {
            **{n: m.clone() for n, m in optimizer.masters.items()},
            **{f"{n} weight": p for n, p in named.items()},
        }
    assert all(torch.equal(steps["within"][name], value) for name, value in steps["before"].items())


def test_small_gradients_of_many_micro_batches_are_not_lost_in_bf16() -> None:
    named = {"w": set_tag(nn.Parameter(torch.ones(1, dtype=torch.bfloat16)), ParameterTag())}
    GradBuffers(named, STATE).zero()
    for _ in range(1000):
        (named["w"] * 1.0).sum().backward()
    assert named["w"].main_grad.item() == 1000.0, "bf16 would stop at 256"


def test_dynamic_loss_scale() -> None:
    scale = LossScale.of(TrainingConfig(fp16=True, initial_loss_scale=8.0))
    assert (scale.value, scale.growth_interval) == (8.0, 1000)
    scale = replace(scale, growth_interval=3)
    seen = []
    for overflow in (False, False, True, False, False, False, False, True, True, True, True, True, True):
        scale = scale.after(overflow)
        seen.append(scale.value)
    assert seen == [8, 8, 4, 4, 4, 8, 8, 4, 2, 1, 1, 1, 1], "halved at an overflow, doubled after three good steps"


def test_fixed_and_absent_loss_scales_never_change() -> None:
    fixed = LossScale.of(TrainingConfig(fp16=True, loss_scale=128.0))
    assert fixed.after(True).after(False) == fixed and fixed.value == 128.0
    assert LossScale.of(TrainingConfig(bf16=True)).value == 1.0


def norm(parts: list[Tensor]) -> float:
    pieces: Any = [SimpleNamespace(grad=part, counts=True) for part in parts]  # what the norm reads of them
    return global_grad_norm(pieces, STATE).item()


@pytest.mark.parametrize(
    "shapes", [[(3,)], [(4096,)], [(4097,), (0,), (5, 7)], [(4095,), (8192,)], [(1 << 24,)], [(2000, 1001)]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_exact_at_any_size(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(shape, generator=generator, dtype=dtype) * 1e-3 for shape in shapes]
    exact = np.sqrt(sum(float(np.square(part.numpy().astype(np.float64)).sum()) for part in parts))
    assert norm(parts) == pytest.approx(exact, rel=2e-8 if dtype == torch.float32 and parts[0].numel() > 1e6 else 2e-7)


def test_it_does_not_depend_on_how_the_gradient_is_cut() -> None:
    """As layouts cut it."""
    grad = torch.randn(1 << 22, generator=torch.Generator().manual_seed(2))
    norms = [norm(list(grad.split(size))) for size in (1 << 22, 1 << 20, 1_000_003, 4096, 777)]
    assert max(norms) / min(norms) - 1 < 1e-7


def test_it_says_what_is_not_finite() -> None:
    for bad in (float("nan"), float("inf")):
        grad = torch.ones(9000)
        grad[8999] = bad
        assert not np.isfinite(norm([grad]))


def rates(train_iters: int, iterations: list[int], **options: Any) -> list[float]:
    config = OptimizerConfig(lr=1.0, min_lr=0.2, **options)
    return [learning_rate(config, train_iters, i) for i in iterations]


def test_lengths_that_are_not_given() -> None:
    assert rates(100, [89, 90, 95], lr_decay_style="WSD") == pytest.approx([1.0, 1.0, 0.6]), "a tenth of the steps"
    assert rates(100, [99, 100], lr_decay_style="linear") == pytest.approx([0.208, 0.2]), "to the last step"
