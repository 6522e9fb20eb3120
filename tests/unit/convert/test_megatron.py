"""Megatron-LM's per-rank files: every layout is read bit for bit, and bad files are refused."""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import types
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch

from megatron_samoe.config.cli import from_mapping
from megatron_samoe.convert.fold import fold_shared
from megatron_samoe.convert.megatron import MegatronReader, plan_dist_export, write_dist_export
from megatron_samoe.convert.megatron.rank_files import FILE_NAME
from megatron_samoe.errors import CheckpointError, ConfigError, MegatronSamoeError
from tests.harness.megatron_files import write_rank_files
from tests.harness.tables import table
from tests.harness.tiny import tiny_config
from tests.hostile.changes import Bomb
from tests.unit.convert.memory_source import assert_equal, logits, new_source, tensors_of

TABLE = table(__file__)

MODELS = TABLE["models"]
SIZES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)]
#: Models, sizes of layouts, and other ways to write a rank's file: names, chunks of layers, complete experts on tensor-parallel ranks.
CASES: list[Any] = [(*model, sizes, {}) for model in MODELS for sizes in SIZES]
CASES += [
    ("moe", {"style": "llama", "moe_layer_freq": "0111"}, (2, 2, 2), way)
    for way in ({"fused": False}, {"experts": "legacy_grouped"})
]
CASES += [(layout, {"num_layers": 8}, (1, 2, 1), {"chunks": 2}) for layout in ("dense", "moe")]
CASES += [("moe", {"style": "llama", "num_layers": 2}, (2, 1, 2), {"etp": 1})]


@pytest.mark.parametrize(("layout", "options", "sizes", "way"), CASES, ids=str)
def test_round_trips_are_bitwise(
    layout: str, options: dict, sizes: tuple[int, int, int], way: dict, tmp_path: Path
) -> None:
    source = new_source(tiny_config(layout, **options))
    folder = write_rank_files(source, tmp_path, *sizes[: 2 if layout == "dense" else 3], **way)
    if "etp" in way:
        assert sorted(p.name for p in folder.iterdir()) == ["mp_rank_00_000", "mp_rank_01_001"]
    reader = MegatronReader(tmp_path)
    expected = fold_shared(source) if layout == "samoe" else source
    assert_equal(tensors_of(reader), tensors_of(expected))
    assert from_mapping(reader.config, "").model == from_mapping(expected.config, "").model
    if layout != "dense":
        assert from_mapping(reader.config, "").moe == from_mapping(expected.config, "").moe
    assert reader.train_state["vocab_size"] == source.train_state["vocab_size"] and reader.train_state["iteration"] == 7
    torch.testing.assert_close(logits(reader), logits(source), rtol=1e-5, atol=1e-6)


def test_a_release_is_found_by_megatrons_tracker(tmp_path: Path) -> None:
    source = new_source(tiny_config("dense", num_layers=2))
    folder = write_dist_export(plan_dist_export(source), tmp_path, None)
    assert folder.name == "release" and (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert_equal(tensors_of(MegatronReader(tmp_path)), tensors_of(source))


def rewrite(folder: Path, change: Any) -> None:
    """Changes the content of every rank's file below a folder."""
    for path in sorted(folder.rglob(FILE_NAME)):
        content = torch.load(path, weights_only=False)
        change(content)
        torch.save(content, path)


def test_optimizer_and_random_state_of_megatron_are_passed_over(tmp_path: Path, monkeypatch: Any) -> None:
    source = new_source(tiny_config("dense", num_layers=2))
    folder = write_rank_files(source, tmp_path)

    module = types.ModuleType("megatron.core.some_future_module")
    module.Mode = type("Mode", (), {"__module__": module.__name__, "__qualname__": "Mode"})
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def add(content: dict) -> None:
        content["args"].mode = module.Mode()
        content["optimizer"] = {"state": {0: {"exp_avg": torch.ones(3)}}}
        states = {"random": random.getstate(), "np": np.random.get_state(), "torch": torch.get_rng_state()}
        content["rng_state"] = [{f"{name}_rng_state": state for name, state in states.items()}]
        content["args"].exit_signal, content["args"].save = signal.SIGTERM, PosixPath("runs")
        content["args"].params_dtype = torch.bfloat16

    rewrite(folder, add)
    assert_equal(tensors_of(MegatronReader(tmp_path)), tensors_of(source))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(extra=Bomb(Path.touch, Path("exploded"))), "could run any code"),
        (lambda c: c.update(checkpoint_version=2.0), "checkpoint_version 2.0; this program reads 3.0"),
        (lambda c: c.pop("args"), "holds no model with its arguments"),
        (lambda c: c.pop("model"), "holds no model"),
        (lambda c: delattr(c["args"], "num_layers"), "keeps no argument num_layers"),
        (lambda c: setattr(c["args"], "use_rope_scaling", True), "use_rope_scaling is True"),
        (lambda c: setattr(c["args"], "squared_relu", True), "squared_relu is True"),
        (lambda c: setattr(c["args"], "bias_gelu_fusion", False), "bias_gelu_fusion is False .exact GELU"),
        (lambda c: setattr(c["args"], "hidden_size", 64), "its arguments say"),
        (lambda c: c["model"].pop("decoder.final_layernorm.weight"), "has no tensor decoder.final_layernorm.weight"),
        (lambda c: c["model"].update({"mtp.layers.0.weight": torch.ones(1)}), "lacks: mtp.layers.0.weight"),
    ],
)
def test_files_of_another_kind_are_refused(change: Any, message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    rewrite(write_rank_files(new_source(tiny_config("dense", num_layers=2)), tmp_path), change)
    with pytest.raises(CheckpointError, match=message) as error:
        MegatronReader(tmp_path)
    assert "\n" not in str(error.value) and not Path("exploded").exists()


@pytest.mark.parametrize(("sizes", "name", "value", "message"), TABLE["misfits"])
def test_arguments_that_the_ranks_tensors_do_not_fit_are_refused(
    sizes: tuple[int, ...], name: str, value: object, message: str, tmp_path: Path
) -> None:
    config = tiny_config("moe", style="llama", **({"group_query_attention": False} if sizes != (1, 1, 1) else {}))
    rewrite(write_rank_files(new_source(config), tmp_path, *sizes), lambda c: setattr(c["args"], name, value))
    with pytest.raises(MegatronSamoeError, match=message):
        MegatronReader(tmp_path)


def test_missing_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    source = new_source(tiny_config("dense", num_layers=2))
    folder = write_rank_files(source, tmp_path / "a", 2)
    (folder / "mp_rank_01" / FILE_NAME).unlink()
    with pytest.raises(CheckpointError, match="incomplete: mp_rank_01 missing"):
        MegatronReader(tmp_path / "a")
    path = write_rank_files(source, tmp_path / "b") / "mp_rank_00" / FILE_NAME
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"model_optim_rng\.pt cannot be read"):
        MegatronReader(tmp_path / "b")
    torch.save({"args": argparse.Namespace()}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before version 1\.6"):
        MegatronReader(tmp_path / "b")
    with pytest.raises(CheckpointError, match="not a checkpoint of Megatron's"):
        MegatronReader(tmp_path / "nowhere")
    (tmp_path / "c" / "iter_0000003").mkdir(parents=True)
    (tmp_path / "c" / "latest_checkpointed_iteration.txt").write_text("3")
    for content, said in (("{}", "None"), ('{"sharded_backend": "zarr", "sharded_backend_version": 1}', "'zarr'")):
        (tmp_path / "c" / "iter_0000003" / "metadata.json").write_text(content)
        with pytest.raises(CheckpointError, match=rf"metadata\.json says sharded_backend {said}; torch_dist is read"):
            MegatronReader(tmp_path / "c")


def test_what_megatron_cannot_hold_is_refused() -> None:
    for options, message in TABLE["not held"]:
        with pytest.raises(ConfigError, match=message):
            plan_dist_export(new_source(tiny_config("moe", **options)))


def test_files_of_other_ranks_and_iterations_are_named(tmp_path: Path) -> None:
    source = new_source(tiny_config("dense", num_layers=2))
    folder = write_rank_files(source, tmp_path, 2, 2, 1)
    shutil.copytree(folder / "mp_rank_01_001", folder / "mp_rank_02_001")
    with pytest.raises(CheckpointError, match=r"files of other ranks than it should: mp_rank_02_001"):
        MegatronReader(tmp_path)
    shutil.rmtree(folder / "mp_rank_02_001")
    rewrite(folder / "mp_rank_01_000", lambda c: c.update(iteration=9))
    with pytest.raises(CheckpointError, match="is mixed: iteration is 9 in mp_rank_01_000 and 7 in another"):
        MegatronReader(tmp_path)


def test_existing_iterations_stay_and_failures_leave_nothing(tmp_path: Path) -> None:
    source = new_source(tiny_config("dense", num_layers=2))
    write_dist_export(plan_dist_export(source), tmp_path, 7)
    with pytest.raises(CheckpointError, match="exists"):
        write_dist_export(plan_dist_export(source), tmp_path, 7)
    broken = plan_dist_export(source)
    del source.weights["final_norm.weight"]
    with pytest.raises(CheckpointError, match="final_norm"):
        write_dist_export(broken, tmp_path, 8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000007", "latest_checkpointed_iteration.txt"]
