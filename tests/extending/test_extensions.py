"""What docs/extending.md says: parts from outside the package train in every layout as in one process; its op against the reference."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.config import PretrainConfig
from megatron_samoe.config.sharing_map import ways
from megatron_samoe.models.blueprint import ModelParts
from megatron_samoe.training.setup import Extensions
from tests.extending.even_scores import EvenScores
from tests.extending.expert_choice import ExpertChoiceRouter
from tests.extending.low_rank import LowRankSharing
from tests.extending.orthogonal_sgd import rules
from tests.extending.own_op import (
    COMPILERS,
    SOURCE,
    SqrtSoftplusRouter,
    reference,
    sqrt_softplus,
    sqrt_softplus_backward,
)
from tests.extending.sliding_window import SlidingWindowAttention
from tests.harness.layout_training import LAYOUTS, train
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks
from tests.harness.tiny import tiny_config, with_layout

pytestmark = pytest.mark.distributed

SITE = Path(__file__).parent / "site"
#: Of those of the parity table; the first by day.
SPREAD = ("pp2 ep2 zero", "tp2 sp etp1 ep2", "tp2 ep2", "zero dp2", "tp2 pp2 ep2 sp zero overlap")
SAMOE: dict[str, Any] = {"layout": "samoe", "style": "llama"}
MOE = {"layout": "moe", "moe_router_topk": 2, "moe_ffn_hidden_size": 32}
#: Model, and what comes from outside.
CASES: dict[str, tuple[dict[str, Any], Extensions]] = {
    "expert choice": (
        {**MOE, "moe_router_load_balancing_type": "none"},
        Extensions(ModelParts(router=ExpertChoiceRouter)),
    ),
    "even scores": ({**MOE, "moe_aux_loss_coeff": 0.3}, Extensions(ModelParts(balance=EvenScores))),
    "pyramid": ({**MOE, "num_experts": (2, 2, 4, 4)}, Extensions()),
    "orthogonal sgd": ({**MOE, "style": "llama"}, Extensions(rules=rules)),
    "orthogonal sgd on a pool": ({"layout": "samoe", "moe_router_topk": 1}, Extensions(rules=rules)),
    "sliding window": (SAMOE, Extensions(ModelParts(attention=SlidingWindowAttention))),
    "own op": (MOE, Extensions(ModelParts(router=SqrtSoftplusRouter))),
    "low rank": ({**SAMOE, "moe_expert_lr_mult": 30.0}, Extensions(ModelParts(sharing=LowRankSharing))),
    "near banks": ({**MOE, "expert_sharing": "near", "num_expert_banks": 3, "samoe_normalization": "l2"}, Extensions()),
}


def train_all(layout: str) -> dict[str, Any] | None:
    """Trains every case on the same processes; the first rank has the results."""
    sys.path.insert(0, str(SITE))  # the package of the way near stands beside this one
    ways.cache_clear()
    found = {}
    for name, (options, extensions) in CASES.items():
        config = with_layout(tiny_config(**options), **LAYOUTS[layout][1])
        found[name] = train(config, torch.float32, steps=4, extensions=extensions)
    return found if not dist.is_initialized() or dist.get_rank() == 0 else None


@cache
def results_of(layout: str) -> dict[str, Any]:
    return run_ranks(train_all, LAYOUTS[layout][0], layout, timeout_s=300)[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", first_by_day(SPREAD))
def test_an_extension_trains_in_a_layout_as_in_one_process(layout: str, case: str) -> None:
    actual, expected = results_of(layout)[case], results_of("one process")[case]
    assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert actual["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    for name, gradient in expected["gradients"].items():
        atol = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(actual["gradients"][name], gradient, rtol=1e-5, atol=atol, msg=name)


def plain(options: dict[str, Any]) -> PretrainConfig:
    """Returns the model without what comes from outside."""
    options = {k: v for k, v in options.items() if k != "num_experts"}
    if options.get("expert_sharing") == "near":
        options["expert_sharing"] = "combined"
    return tiny_config(**options)


@pytest.mark.parametrize("case", CASES)
def test_an_extension_has_an_effect(case: str) -> None:
    own = train(plain(CASES[case][0]), torch.float32, steps=4)
    assert results_of("one process")[case]["losses"][-1] != pytest.approx(own["losses"][-1], rel=1e-5)


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")


@needs_compiler
@pytest.mark.parametrize("shape", [(0, 4), (3, 5), (1000,)])
def test_the_kernel_is_its_twin_with_its_gradient(shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape) * 30).requires_grad_()
    exact = x.detach().double().requires_grad_()
    weight = torch.randn(shape)
    torch.testing.assert_close(sqrt_softplus(x).double(), reference(exact), rtol=1e-5, atol=0)
    (dx,) = torch.autograd.grad((sqrt_softplus(x) * weight).sum(), x)
    (expected,) = torch.autograd.grad((reference(exact) * weight).sum(), exact)
    torch.testing.assert_close(dx.double(), expected, rtol=1e-5, atol=0)


@needs_compiler
def test_torch_finds_nothing_wrong_with_it() -> None:
    x = torch.randn(4, 6)
    torch.library.opcheck(sqrt_softplus, (x.requires_grad_(),))
    torch.library.opcheck(sqrt_softplus, (x.detach().t(),))
    torch.library.opcheck(sqrt_softplus_backward, (x.detach(), torch.randn(4, 6)))


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_the_same_source_compiles_for_cuda(tmp_path: Path) -> None:
    built = tmp_path / "kernels.so"
    subprocess.run([*COMPILERS["cuda"], "-O3", "-shared", "-o", built, SOURCE], check=True)
    symbols = subprocess.run(["nm", "-D", built], check=True, capture_output=True, text=True).stdout
    assert " T forward" in symbols and " T backward" in symbols
