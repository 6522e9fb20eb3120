"""Checkpoints of format torch_dist against Megatron-Core, which writes and reads them by its own `dist_checkpointing`."""

from __future__ import annotations

import argparse
import functools
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.config.cli import from_mapping
from megatron_samoe.convert.megatron import MegatronReader, plan_dist_export, write_dist_export
from megatron_samoe.dist_checkpointing.saving import write_sharded
from megatron_samoe.dist_checkpointing.sharded_state import UnreadTensor
from megatron_samoe.errors import CheckpointError
from megatron_samoe.parallel_state.state import single_process_state
from tests.harness.megatron_model import VOCABULARY, Layout, Model, batches
from tests.harness.megatron_training import continued, converted, run_megatron, saved
from tests.harness.pairs import first_by_day
from tests.harness.tables import table
from tests.harness.tiny import tiny_config
from tests.hostile.changes import Bomb
from tests.unit.convert.memory_source import MemorySource, assert_equal, logits, new_source, tensors_of

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

#: By name, what Megatron-Core trains, and in which layout of how many ranks.
CASES: dict[str, tuple[int, Layout, Model]] = {
    name: (ranks, Layout(**sizes), Model(**model))
    for name, (ranks, sizes, model) in table(__file__, tuples=False)["models"].items()
}
BY_DAY = list(CASES)[:3]


def asked(step: int) -> tuple[Tensor, Tensor]:
    """Returns the ids and labels, [B, S], that Megatron-Core is given in a step, all micro-batches together."""
    ids = batches(step).flatten(0, 1)
    return ids[:, :-1], ids[:, 1:]


Trained = Callable[[str], tuple[Path, Tensor]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Returns what gives the folder that Megatron-Core has saved of a case, and its logits, once for all tests."""

    @functools.cache
    def run(case: str) -> tuple[Path, Tensor]:
        folder, (ranks, layout, kind) = tmp_path_factory.mktemp("trained"), CASES[case]
        return folder, run_megatron(saved, ranks, layout, kind, str(folder))[-1]

    return run


@pytest.mark.parametrize("case", first_by_day(CASES, 3))
def test_what_megatron_core_trained_computes_the_same_here(case: str, trained: Trained) -> None:
    (folder, theirs), kind = trained(case), CASES[case][2]
    reader = MegatronReader(folder)
    torch.testing.assert_close(logits(reader, tokens=asked(9)[0]), theirs[:, :VOCABULARY], rtol=1e-5, atol=1e-5)
    config = from_mapping(reader.config, "test")
    assert config.moe.sharing == (kind.sharing or "own") and reader.train_state["iteration"] == 2
    has_optimizer = kind.metadata is None and not kind.latent and kind.sharing is None
    assert any("optimizer state" in note for note in reader.notes) == has_optimizer


def ours_like(folder: Path) -> MemorySource:
    """Returns a model of ours with other weights than the one that Megatron-Core saved, and of the same options."""
    reader = MegatronReader(folder)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: reader.read(name) + torch.randn(stored.shape, generator=generator) * 0.1
        for name, stored in reader.tensors.items()
    }
    return MemorySource(weights, reader.config, reader.train_state)


@pytest.mark.parametrize(
    "case", first_by_day([*BY_DAY[:2], "MoE, EP 2 x PP 2", "dense, tied", "latent attention, dense layers"], 2)
)
def test_megatron_core_trains_on_from_one_of_ours(case: str, trained: Trained, tmp_path: Path) -> None:
    """All of its weights are loaded, and its loss of the first step is ours."""
    ours, (ranks, layout, kind) = ours_like(trained(case)[0]), CASES[case]
    folder = write_dist_export(plan_dist_export(ours), tmp_path / "ours", 3)
    weights, losses = run_megatron(continued, ranks, layout, kind, str(folder))[-1]
    tokens, labels = asked(0)
    expected = torch.nn.functional.cross_entropy(logits(ours, tokens=tokens), labels.flatten())
    assert losses[0] == pytest.approx(float(expected), rel=1e-5) and len(losses) == 2
    final = next(weight for name, weight in weights.items() if name.endswith("final_layernorm.weight"))
    assert torch.equal(final, ours.weights["final_norm.weight"])


#: A case, and ranks and sizes of the layout whose files Megatron-Core writes of it.
CONVERTED = [
    (BY_DAY[0], 4, {"tp": 2, "pp": 2, "ep": 2}),  # complete experts on tensor-parallel ranks
    (BY_DAY[0], 2, {"tp": 2, "etp": 2}),
    ("MoE", 4, {"ep": 2, "pp": 2}),
    ("latent attention, dense layers", 1, {}),
]


@pytest.mark.parametrize(("case", "ranks", "sizes"), first_by_day(CONVERTED))
def test_megatrons_own_rank_files_of_one_of_ours_come_back(
    case: str, ranks: int, sizes: dict[str, int], trained: Trained, tmp_path: Path
) -> None:
    ours, (_, layout, kind) = ours_like(trained(case)[0]), CASES[case]
    folder = write_dist_export(plan_dist_export(ours), tmp_path / "ours", 3)
    run_megatron(converted, ranks, replace(layout, **sizes), kind, str(folder), str(tmp_path / "files"))
    again = MegatronReader(tmp_path / "files")
    assert_equal(tensors_of(again), tensors_of(ours))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a checkpoint of format torch_dist that we wrote."""
    source = new_source(tiny_config("moe", style="llama", moe_router_topk=2))
    return write_dist_export(plan_dist_export(source), tmp_path_factory.mktemp("ours"), 7)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = torch.load(folder / "common.pt", weights_only=False)
    change(content)
    torch.save(content, folder / "common.pt")
    return folder


REFUSED: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda c: c.pop("args"), r"keeps no arguments of Megatron-LM.*dist_checkpointing\.save\("),
    (lambda c: c.update(extra=Bomb(Path.touch, Path("exploded"))), "could run any code"),
    (lambda c: c.update(checkpoint_version=2.0), "checkpoint_version 2.0; 3.0 is read"),
    (lambda c: setattr(c["args"], "num_layers", 3), r"num_layers|layers"),
    (lambda c: setattr(c["args"], "num_experts", 8), "its arguments say"),
    (lambda c: setattr(c["args"], "multi_latent_attention", True), "qk_layernorm is False"),
    (lambda c: setattr(c["args"], "rope_type", "yarn"), "read with latent attention only"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_cannot_be_read_is_refused(
    change: Callable[[dict[str, Any]], object],
    message: str,
    ours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = rewritten(Path(shutil.copytree(ours, tmp_path / "copy")), change)
    with pytest.raises(CheckpointError, match=message) as error:
        MegatronReader(folder)
    assert "\n" not in str(error.value) and not Path("exploded").exists()


def test_a_pool_whose_arguments_are_missing_is_refused(tmp_path: Path) -> None:
    args = argparse.Namespace(num_layers=2, hidden_size=8, num_attention_heads=2, padded_vocab_size=16, num_experts=2)
    part = UnreadTensor(lambda: torch.zeros(2, 2, 8, 8), (2, 2, 8, 8), torch.float32)
    write_sharded({"expert_pool.bank.w1": [part]}, str(tmp_path), single_process_state())
    torch.save({"args": args}, tmp_path / "common.pt")
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    with pytest.raises(CheckpointError, match="its arguments keep no expert_sharing"):
        MegatronReader(tmp_path)


def test_arguments_are_read_from_an_object_as_newer_versions_keep_them(ours: Path, tmp_path: Path) -> None:
    """From 0.20 on, what is no tensor is a list of one mapping, saved under one name among the tensors."""
    common, objects = io.BytesIO(), {}
    torch.save([torch.load(ours / "common.pt", weights_only=False)], common)
    objects["common_state/shard_0_1"] = common.getvalue()
    reader = MegatronReader(ours)
    plan = plan_dist_export(reader)
    write_sharded(plan.tensors, str(tmp_path), single_process_state(), {**plan.objects, **objects})
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    again = MegatronReader(tmp_path)
    assert again.config == reader.config and again.train_state == reader.train_state
    assert_equal(tensors_of(again), tensors_of(reader))
