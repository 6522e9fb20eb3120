"""Muon over ranks: every layout trains as one process, and goes on from any other layout's checkpoint."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_samoe.config import PretrainConfig
from tests.distributed.test_resharding_matrix import begin, go_on_from_each
from tests.harness.layout_training import assert_same, train
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks
from tests.harness.tables import table
from tests.harness.tiny import tiny_config, with_layout, with_options

pytestmark = pytest.mark.distributed
TABLE = table(__file__)

MODELS: dict[str, dict[str, Any]] = TABLE["models"]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = TABLE["layouts"]
DOUBLE = ("tp2 ep2", "pp2 ep2 zero")


def configuration(model: str, layout: str) -> PretrainConfig:
    sizes = dict(LAYOUTS[layout][1])
    if model == "dense":
        sizes = {axis: size for axis, size in sizes.items() if axis not in ("ep", "etp")}
    pool = sizes.pop("pool", "sharded")
    config = tiny_config(**MODELS[model], optimizer="muon", lr=3e-3)
    if config.moe.shares_experts:
        config = with_options(config, samoe_pool_placement=pool)
    return with_layout(config, **sizes)


def train_all(layout: str, dtype: torch.dtype) -> dict[str, Any] | None:
    """Trains every model on the same processes; the first rank has the results."""
    found = {model: train(configuration(model, layout), dtype, steps=4) for model in MODELS}
    return found if not dist.is_initialized() or dist.get_rank() == 0 else None


@cache
def results_of(layout: str, dtype: torch.dtype) -> dict[str, Any]:
    return run_ranks(train_all, LAYOUTS[layout][0], layout, dtype, timeout_s=300)[0]


@pytest.mark.night
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one process"])
def test_a_layout_trains_as_one_process(layout: str, model: str) -> None:
    assert_same(results_of(layout, torch.float32)[model], results_of("one process", torch.float32)[model], 1e-5)


@pytest.mark.night
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", DOUBLE)
def test_in_double_precision_weights_are_the_same_as_well(layout: str, model: str) -> None:
    actual, expected = results_of(layout, torch.float64)[model], results_of("one process", torch.float64)[model]
    assert_same(actual, expected, 1e-11)
    for name, weight in expected["weights"].items():
        scale = weight.abs().max().item()
        torch.testing.assert_close(actual["weights"][name], weight, rtol=0, atol=1e-10 * scale, msg=name)


def test_muon_learns_otherwise_than_adamw() -> None:
    adam = train(with_options(configuration("moe", "one process"), optimizer="adam"), torch.float32, steps=4)
    assert adam["losses"][-1] != pytest.approx(results_of("one process", torch.float32)["moe"]["losses"][-1], rel=1e-4)
    assert "embedding.word.weight" in adam["gradients"], "frozen parameters have gradients"


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"), first_by_day([("tp2 ep2", "zero dp2"), ("zero dp2", "pp2 ep2 zero")])
)
def test_a_checkpoint_goes_on_in_another_layout(saved_by: str, loaded_by: str, tmp_path: Path) -> None:
    place = {"save": str(tmp_path), "load": str(tmp_path)}
    configs = [with_options(configuration("samoe step", layout), **place) for layout in (saved_by, loaded_by)]
    first = run_ranks(begin, LAYOUTS[saved_by][0], configs[0])[0]
    (then,) = run_ranks(go_on_from_each, LAYOUTS[loaded_by][0], [configs[1]])[0]
    assert sum(name.startswith("optimizer.momentum.") for name in first["saved"]) > 10
    assert then["saved"].keys() == first["saved"].keys()
    assert all(torch.equal(then["saved"][name], tensor) for name, tensor in first["saved"].items())
    torch.testing.assert_close(torch.tensor(then["losses"]), torch.tensor(first["losses"]), rtol=1e-5, atol=0)
