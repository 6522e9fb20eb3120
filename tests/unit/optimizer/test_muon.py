"""Muon against singular value decompositions, torch's Muon, and the configuration's choice of matrices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megatron_samoe.config import OptimizerConfig
from megatron_samoe.distributed.grad_buffer import GradBuffers
from megatron_samoe.errors import ConfigError
from megatron_samoe.models.rank_model import RankModel
from megatron_samoe.ops import extension
from megatron_samoe.optimizer.mixed_precision import MixedPrecisionOptimizer
from megatron_samoe.optimizer.muon import Muon, newton_schulz, update_scale
from megatron_samoe.optimizer.param_groups import ParamRule, build_param_groups
from megatron_samoe.optimizer.whole_tensors import _share, even_sizes
from megatron_samoe.parallel_state import Group, ParameterTag, set_tag, single_process_state
from megatron_samoe.parallel_state.parameter_tag import Init
from tests.harness.op_checks import threads_of_torch
from tests.harness.tiny import VOCAB_SIZE, tiny_config

STATE = single_process_state()
CONFIG = OptimizerConfig(optimizer="muon", weight_decay=0.3)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_singular_values(matrix: Tensor, num_steps: int) -> Tensor:
    """The slow twin: the polynomial on each singular value of one matrix."""
    u, s, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    s = s / np.sqrt(np.square(s).sum())
    for _ in range(num_steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return torch.from_numpy((u * s) @ vh)


@pytest.mark.parametrize("shape", [(24, 48), (128, 32)])
def test_steps_at_once_err_as_single_ones_where_singular_values_decay(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    u, s, vh = torch.linalg.svd(drawn(*shape), full_matrices=False)
    x = (u * torch.logspace(0, -6, len(s), dtype=s.dtype)) @ vh
    expected, errors = by_singular_values(x, 5), []
    for at_once in (1, 3):
        monkeypatch.setattr("megatron_samoe.optimizer.muon.STEPS_AT_ONCE", at_once)
        errors.append(float((newton_schulz(x.float(), 5) - expected).norm() / expected.norm()))
    assert errors[0] != errors[1] < 3 * errors[0] < 1e-4


@pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")
@pytest.mark.parametrize(
    "shape", [(1, 7, 7), (5, 3, 40), (3, 40, 3), (2, 1, 5), (4, 33, 70), (3, 128, 64), (1, 200, 256)]
)
def test_the_compiled_steps_equal_the_reference(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """To fp32's rounding, and with the same bits whatever is stacked with a matrix and however many threads there are."""
    muon, stack = Muon(), drawn(*shape).float()
    stack[0] *= 1e-3
    found = muon.direction(stack, 1)
    expected = torch.stack([by_singular_values(m, 5) for m in stack.double()]) * (
        muon.extra_scale * update_scale(muon.scale, *shape[1:])
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)
    assert not newton_schulz(torch.zeros(shape), 5).any()
    monkeypatch.setattr("megatron_samoe.optimizer.muon.newton_schulz", None)  # none of it was torch's
    assert torch.equal(found, torch.cat([muon.direction(one[None], 1) for one in stack]))
    assert not muon.direction(torch.zeros(shape), 1).any()
    with threads_of_torch(3 if torch.get_num_threads() != 3 else 2):
        assert torch.equal(found, muon.direction(stack, 1))


@pytest.mark.parametrize("cached", [1, 70, 1 << 18])
def test_each_expert_is_a_matrix(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of them are taken at once: one, two on a thread, or all."""
    monkeypatch.setattr("megatron_samoe.optimizer.muon.CACHED_ELEMENTS", cached)
    stack = drawn(6, 8, 4)
    stack[2] *= 1e3
    muon = Muon()
    together = muon.direction(stack, 1)
    for own, whole in zip(together, stack, strict=True):
        torch.testing.assert_close(own, muon.direction(whole[None], 1)[0], rtol=1e-11, atol=1e-12)


def model(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    shapes = {"layers.0.mlp.fc1.weight": (12, 8), "layers.0.mlp.fc2.weight": (8, 12), "layers.0.mlp.fc1.bias": (12,)}
    return {n: set_tag(nn.Parameter(drawn(*s).to(dtype)), ParameterTag()) for n, s in shapes.items()}


QKV, WIDE = "layers.0.attention.qkv.weight", "layers.0.mlp.fc1.weight"  # two key-value heads with three queries each


@pytest.mark.parametrize(
    "options",
    [*({"muon_num_ns_steps": steps} for steps in (1, 2, 3, 4, 9)), {"muon_momentum": 0.5}, {"muon_use_nesterov": False}]
    + [{"muon_scale_mode": mode} for mode in ("unit_rms_norm", "shape_scaling")]
    + [{"muon_extra_scale_factor": 0.7}, {"muon_split_qkv": False}],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_option_has_the_effect_of_its_formula(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Of three steps, by singular values; compiled and not."""
    known: dict[str, Any] = {"num_ns_steps": 5, "momentum": 0.95, "use_nesterov": True, "scale_mode": "spectral"}
    known |= {"extra_scale_factor": 0.2, "split_qkv": True} | {n.removeprefix("muon_"): v for n, v in options.items()}
    shapes = {QKV: (2, 5, 4, 6), WIDE: (12, 8)}
    named = {n: set_tag(nn.Parameter(drawn(*shape).to(dtype)), ParameterTag()) for n, shape in shapes.items()}
    config = replace(CONFIG, lr_mult_patterns=("fc1=0.5",), **options)
    optimizer = MixedPrecisionOptimizer(GradBuffers(named, STATE), config)
    weights = {n: p.detach().double().clone() for n, p in named.items()}
    momenta = {n: torch.zeros_like(w) for n, w in weights.items()}

    def direction(x: Tensor) -> Tensor:
        rows, columns = x.flatten(0, -2).shape
        ratio = {
            "spectral": max(rows, columns),
            "unit_rms_norm": rows / columns,
            "shape_scaling": max(1, rows / columns),
        }
        factor = known["extra_scale_factor"] * ratio[known["scale_mode"]] ** 0.5
        return factor * by_singular_values(x.flatten(0, -2), known["num_ns_steps"]).view_as(x)

    for step in range(3):
        for name, weight in weights.items():
            grad = drawn(*weight.shape, seed=step)
            named[name].main_grad.copy_(grad)  # type: ignore[attr-defined]
            momenta[name] = known["momentum"] * momenta[name] + grad
            x = grad + known["momentum"] * momenta[name] if known["use_nesterov"] else momenta[name]
            splits = name == QKV and known["split_qkv"]
            found = (
                torch.cat([direction(part) for part in (x[:, :3], x[:, 3:4], x[:, 4:])], 1) if splits else direction(x)
            )
            weights[name] = weight - (0.1 if name == QKV else 0.05) * (found + 0.3 * weight)
        optimizer.step(0.1)
    for name, weight in weights.items():
        close = {"rtol": 1e-4, "atol": 5e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
        torch.testing.assert_close(named[name].double(), weight, **close)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "least", "most"), [("fp32", 0.0, 1e-4), ("bf16", 1e-3, 3e-2)])
def test_products_round_as_their_precision_says(dtype: Any, least: float, most: float) -> None:
    """The first step of a model, whose direction is known by singular values."""
    ours, rate = model(), 0.1
    config = replace(CONFIG, weight_decay=0.0, muon_ns_dtype=dtype, muon_use_nesterov=False)
    optimizer = MixedPrecisionOptimizer(GradBuffers(ours, STATE), config)
    weight = ours["layers.0.mlp.fc1.weight"]
    before, gradient = weight.detach().double().clone(), drawn(*weight.shape)
    weight.main_grad.copy_(gradient)
    optimizer.step(rate)
    moved = (before - weight.detach()) / rate / (0.2 * 12**0.5)
    expected = by_singular_values(gradient, 5)
    assert least <= float((moved - expected).norm() / expected.norm()) < most


@pytest.mark.parametrize("layout", ["dense", "moe", "samoe", "tied"])
def test_matrices_of_hidden_layers_are_muons(layout: str) -> None:
    options = {"layout": "moe", "expert_sharing": "0,1,1,0"} if layout == "tied" else {"layout": layout}
    extra = {} if layout == "dense" else {"moe_shared_expert_intermediate_size": 16}
    config = tiny_config(**options, style="llama", qk_layernorm=True, **extra)
    named = RankModel(config, VOCAB_SIZE, single_process_state("meta"), torch.float32).global_parameters()
    for group in build_param_groups(named, CONFIG):
        for name in group.names:
            is_hidden = (
                ".qkv." in name or ".attention.output." in name or ".fc" in name or name.endswith((".w1", ".w2"))
            )
            assert isinstance(group.update, Muon) == (is_hidden and not name.endswith("bias")), name
            assert not isinstance(group.update, Muon) or group.update.splits_qkv == (".qkv." in name)


def test_steps_of_all_parameters_are_not_held_at_once() -> None:
    """A step that is as large as all of them, and then their directions, would need as much memory as the weights twice."""
    calls = []

    class Recorded(Muon):
        def accumulate(self, grad: Tensor, moments: Any, step: int) -> Tensor:
            calls.append(("step", grad.numel()))
            return super().accumulate(grad, moments, step)

        def direction(self, step: Tensor, num_stacked: int) -> Tensor:
            calls.append(("direction", step.numel()))
            return super().direction(step, num_stacked)

    parameters = model()
    buffers = GradBuffers(parameters, STATE)
    rules = (ParamRule(r"fc[12]\.weight", update=Recorded()),)
    MixedPrecisionOptimizer(buffers, CONFIG, rules=rules).step(0.1)
    assert calls == [("step", 96), ("direction", 96)] * 2


def test_muon_on_a_vector_is_refused_by_name() -> None:
    rules = (ParamRule("bias", update=Muon()),)
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.fc1\.bias.*Muon.*is not a matrix"):
        MixedPrecisionOptimizer(GradBuffers(model(), STATE), CONFIG, rules=rules)
    stack = {"w": set_tag(nn.Parameter(torch.ones(3, 4)), ParameterTag(init=Init(num_indexed_dims=1)))}
    with pytest.raises(ConfigError, match=r"w \[3, 4\] is not a matrix"):
        MixedPrecisionOptimizer(GradBuffers(stack, STATE), CONFIG, rules=(ParamRule("w", update=Muon()),))


def test_turns_go_round() -> None:
    """Ranks own as many matrices as others; layouts' answers show that directions come to them and go back."""
    assert even_sizes(5, 3, 0) == [2, 2, 1]
    assert even_sizes(5, 3, 2) == [2, 1, 2]
    assert even_sizes(1, 4, 3) == [0, 0, 0, 1]
    assert even_sizes(0, 2, 1) == [0, 0]
    turns: dict[str, int] = {}
    shares = [_share(count, Group("edp", (0, 1, 2), 0), "edp", turns) for count in (12, 7, 4)]
    owned = [sum(of_rank) for of_rank in zip(*shares, strict=True)]
    assert sum(owned) == 23 and max(owned) - min(owned) <= 1, "over all kinds of tensors"
