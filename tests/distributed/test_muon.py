"""Muon learns otherwise than Adam, and goes on from another layout's checkpoint. test_layout_parity trains it in all layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.config import PretrainConfig
from tests.distributed.test_resharding_matrix import begin, go_on_from_each
from tests.harness.layout_training import layout_config, train
from tests.harness.pairs import first_by_day
from tests.harness.ranks import run_ranks
from tests.harness.tiny import tiny_config, with_layout, with_options

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2 ep2": {"tp": 2, "ep": 2},
    "zero dp4": {"zero": True, "bucket": 3000},
    "pp2 ep2 zero": {"pp": 2, "ep": 2, "zero": True},
}


def configuration(layout: str, folder: Path) -> PretrainConfig:
    model = tiny_config(style="llama", moe_shared_expert_intermediate_size=16, optimizer="muon", lr=3e-3)
    return with_options(with_layout(model, **LAYOUTS[layout]), save=str(folder), load=str(folder))


def test_muon_learns_otherwise_than_adamw() -> None:
    muon = layout_config("one process", "muon moe")
    of_muon, of_adam = (train(with_options(muon, optimizer=name), torch.float32, steps=4) for name in ("muon", "adam"))
    assert of_adam["losses"][-1] != pytest.approx(of_muon["losses"][-1], rel=1e-4)
    assert "embedding.word.weight" in of_adam["gradients"], "frozen parameters have gradients"


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"), first_by_day([("tp2 ep2", "zero dp4"), ("zero dp4", "pp2 ep2 zero")])
)
def test_a_checkpoint_goes_on_in_another_layout(saved_by: str, loaded_by: str, tmp_path: Path) -> None:
    first = run_ranks(begin, 4, configuration(saved_by, tmp_path))[0]
    (then,) = run_ranks(go_on_from_each, 4, [configuration(loaded_by, tmp_path)])[0]
    assert sum(name.startswith("optimizer.momentum.") for name in first["saved"]) > 10
    assert then["saved"].keys() == first["saved"].keys()
    assert all(torch.equal(then["saved"][name], tensor) for name, tensor in first["saved"].items())
    torch.testing.assert_close(torch.tensor(then["losses"]), torch.tensor(first["losses"]), rtol=1e-5, atol=0)
