"""Megatron-LM's per-rank files: what we write comes back bit for bit, from every layout, and bad files are refused."""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import types
import zipfile
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch

from megatron_samoe.config.cli import from_mapping
from megatron_samoe.convert.fold import fold_shared
from megatron_samoe.convert.megatron import MegatronLayout, MegatronReader, MegatronStyle, plan_export, write_export
from megatron_samoe.convert.megatron.rank_files import FILE_NAME
from megatron_samoe.errors import CheckpointError, ConfigError, MegatronSamoeError
from tests.harness.tiny import tiny_config
from tests.unit.convert.memory_source import MemorySource, logits, new_source

LOCAL = MegatronStyle("local", "sequential")
LEGACY = MegatronStyle("transformer_engine", "legacy_grouped")


def export(source: MemorySource, root: Path, *sizes: int, style: MegatronStyle | None = None, **options: int) -> Path:
    return write_export(plan_export(source, MegatronLayout(*sizes, style=style or MegatronStyle(), **options)), root, 7)


def assert_same_model(actual: Any, expected: Any) -> None:
    names = [name for name in expected.tensors if not name.startswith(("optimizer.", "training."))]
    assert sorted(actual.tensors) == sorted(names)
    for name in names:
        ours, theirs = expected.read(name), actual.read(name)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)], ids=str)
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("dense", {"style": "gpt3"}),
        ("dense", {"style": "llama", "qk_layernorm": True}),
        ("moe", {"style": "gpt3", "moe_layer_freq": "0101", "moe_router_topk": 2}),
        ("moe", {"style": "llama", "moe_shared_expert_intermediate_size": 24, "moe_ffn_hidden_size": 16}),
        ("samoe", {"style": "llama"}),
    ],
)
def test_round_trips_are_bitwise(layout: str, options: dict, sizes: tuple[int, int, int], tmp_path: Path) -> None:
    source = new_source(tiny_config(layout, **options))
    if layout == "dense" and sizes[2] > 1:
        with pytest.raises(ConfigError, match="must be 1 for a dense model"):
            export(source, tmp_path, *sizes)
        return
    folder = export(source, tmp_path, *sizes)
    # Experts with biases are whole on tensor-parallel ranks, so that not every pair of ranks exists.
    whole_experts = layout == "moe" and options["style"] == "gpt3"
    num_pairs = max(sizes[0], sizes[2]) if whole_experts else sizes[0] * sizes[2]
    assert len(list(folder.iterdir())) == num_pairs * sizes[1]
    reader = MegatronReader(tmp_path)
    expected = fold_shared(source) if layout == "samoe" else source
    assert_same_model(reader, expected)
    assert from_mapping(reader.config, "").model == from_mapping(expected.config, "").model
    if layout != "dense":
        assert from_mapping(reader.config, "").moe == from_mapping(expected.config, "").moe
    assert reader.train_state["vocab_size"] == source.train_state["vocab_size"] and reader.train_state["iteration"] == 7
    torch.testing.assert_close(logits(reader), logits(source), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("style", [LOCAL, LEGACY], ids=["local", "legacy_grouped"])
def test_other_names_of_experts_and_norms_round_trip(style: MegatronStyle, tmp_path: Path) -> None:
    source = new_source(tiny_config("moe", style="llama", moe_layer_freq="0111"))
    export(source, tmp_path, 2, 2, 2, style=style)
    assert_same_model(MegatronReader(tmp_path), source)


def test_names_are_those_of_megatron_core(tmp_path: Path) -> None:
    source = new_source(tiny_config("moe", style="llama", moe_layer_freq="0111"))
    folder = export(source, tmp_path, 2, 2, 2)
    assert sorted(p.name for p in folder.iterdir())[:3] == [
        "mp_rank_00_000_000",
        "mp_rank_00_000_001",
        "mp_rank_00_001_000",
    ]
    content = torch.load(folder / "mp_rank_01_001_001" / FILE_NAME, weights_only=False)
    assert content["checkpoint_version"] == 3.0 and content["iteration"] == 7
    assert content["args"].tensor_model_parallel_size == 2 and content["args"].padded_vocab_size == 112
    model = content["model"]
    qkv = source.weights["layers.3.attention.qkv.weight"]
    assert torch.equal(model["decoder.layers.1.self_attention.linear_qkv.weight"], qkv[1:].flatten(0, 2))
    w1 = source.weights["layers.2.moe.experts.w1"]  # [E, 2, F, H]
    assert torch.equal(model["decoder.layers.0.mlp.experts.linear_fc1.weight1"], w1[3, :, 24:].flatten(0, 1))
    assert torch.equal(model["output_layer.weight"][:48], source.weights["output.weight"][56:])
    assert not model["output_layer.weight"][48:].any()
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "7"


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ((2, 1, 1), ["mp_rank_00", "mp_rank_01"]),
        ((1, 2, 1), ["mp_rank_00_000", "mp_rank_00_001"]),
        ((1, 1, 2), ["mp_rank_00_000", "mp_rank_00_001"]),
    ],
)
def test_folders_name_only_axes_that_are_split(sizes: tuple, names: list[str], tmp_path: Path) -> None:
    folder = export(new_source(tiny_config("moe", num_layers=2)), tmp_path, *sizes)
    assert sorted(p.name for p in folder.iterdir()) == names


def test_a_release_is_found_by_megatrons_tracker(tmp_path: Path) -> None:
    source = new_source(tiny_config("dense", num_layers=2))
    folder = write_export(plan_export(source, MegatronLayout()), tmp_path, None)
    assert folder.name == "release" and (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert_same_model(MegatronReader(tmp_path), source)


def rewrite(folder: Path, change: Any) -> None:
    """Changes the content of every rank's file below a folder."""
    for path in sorted(folder.rglob(FILE_NAME)):
        content = torch.load(path, weights_only=False)
        change(content)
        torch.save(content, path)


@pytest.mark.parametrize("layout", ["dense", "moe"])
def test_interleaved_chunks_lie_as_megatron_deals_them(layout: str, tmp_path: Path) -> None:
    source = new_source(tiny_config(layout, num_layers=8))
    folder = export(source, tmp_path, 1, 2, 1, virtual_pipeline=2)
    # Runs of two layers: rank 0 has the first and the third, rank 1 the second and the fourth.
    for rank, chunk, layer in ((0, 0, 0), (1, 0, 2), (0, 1, 4), (1, 1, 6)):
        content = torch.load(folder / f"mp_rank_00_{rank:03d}" / FILE_NAME, weights_only=False)
        assert content["args"].virtual_pipeline_model_parallel_size == 2 and "model" not in content
        ours = source.weights[f"layers.{layer + 1}.attention.output.weight"]
        model = content[f"model{chunk}"]
        assert torch.equal(model["decoder.layers.1.self_attention.linear_proj.weight"], ours)
        assert ("embedding.word_embeddings.weight" in model) == (rank == chunk == 0)
        assert ("output_layer.weight" in model) == ("decoder.final_layernorm.weight" in model) == (rank == chunk == 1)
    assert_same_model(MegatronReader(tmp_path), source)


def test_whole_experts_on_tensor_parallel_ranks(tmp_path: Path) -> None:
    """Expert-tensor size 1 with tensor-parallel size 2: two ranks, (tp 0, ep 0) and (tp 1, ep 1), hold everything."""
    source = new_source(tiny_config("moe", style="llama", num_layers=2))
    folder = export(source, tmp_path, 2, 1, 2, expert_tensor_parallel=1)
    assert sorted(p.name for p in folder.iterdir()) == ["mp_rank_00_000", "mp_rank_01_001"]
    model = torch.load(folder / "mp_rank_01_001" / FILE_NAME, weights_only=False)["model"]
    w2 = source.weights["layers.1.moe.experts.w2"]
    assert torch.equal(model["decoder.layers.1.mlp.experts.linear_fc2.weight0"], w2[2])
    assert_same_model(MegatronReader(tmp_path), source)


def test_optimizer_and_random_state_of_megatron_are_passed_over(tmp_path: Path, monkeypatch: Any) -> None:
    source = new_source(tiny_config("dense", num_layers=2))
    folder = export(source, tmp_path)

    module = types.ModuleType("megatron.core.some_future_module")
    module.Mode = type("Mode", (), {"__module__": module.__name__, "__qualname__": "Mode"})
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def add(content: dict) -> None:
        content["args"].mode = module.Mode()
        content["optimizer"] = {"state": {0: {"exp_avg": torch.ones(3)}}}
        content["rng_state"] = [{"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(),
                                 "torch_rng_state": torch.get_rng_state()}]  # fmt: skip
        content["args"].exit_signal, content["args"].save = signal.SIGTERM, PosixPath("runs")
        content["args"].params_dtype = torch.bfloat16

    rewrite(folder, add)
    assert_same_model(MegatronReader(tmp_path), source)


class Bomb:
    """Unpickling it would create a file."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(extra=Bomb()), "could run any code"),
        (lambda c: c.update(checkpoint_version=2.0), "checkpoint_version 2.0; this program reads 3.0"),
        (lambda c: c.pop("args"), "holds no model with its arguments"),
        (lambda c: c.pop("model"), "holds no model"),
        (lambda c: delattr(c["args"], "num_layers"), "keeps no argument num_layers"),
        (lambda c: setattr(c["args"], "use_rope_scaling", True), "use_rope_scaling is True"),
        (lambda c: setattr(c["args"], "squared_relu", True), "squared_relu is True"),
        (lambda c: setattr(c["args"], "hidden_size", 64), "its arguments say"),
        (lambda c: c["model"].pop("decoder.final_layernorm.weight"), "has no tensor decoder.final_layernorm.weight"),
        (lambda c: c["model"].update({"mtp.layers.0.weight": torch.ones(1)}), "lacks: mtp.layers.0.weight"),
    ],
)
def test_files_of_another_kind_are_refused(change: Any, message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    rewrite(export(new_source(tiny_config("dense", num_layers=2)), tmp_path), change)
    with pytest.raises(CheckpointError, match=message) as error:
        MegatronReader(tmp_path)
    assert "\n" not in str(error.value) and not Path("exploded").exists()


@pytest.mark.parametrize(
    ("sizes", "name", "value", "message"),
    [((4, 1, 1), "num_attention_heads", 6, "its arguments say"), ((1, 1, 4), "num_experts", 2, "2 experts on 4")],
)
def test_sizes_that_the_ranks_do_not_divide_are_refused(
    sizes: tuple[int, ...], name: str, value: int, message: str, tmp_path: Path
) -> None:
    folder = export(new_source(tiny_config("moe", style="llama", group_query_attention=False)), tmp_path, *sizes)
    rewrite(folder, lambda content: setattr(content["args"], name, value))
    with pytest.raises(CheckpointError, match=message):
        MegatronReader(tmp_path)


def test_missing_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    source = new_source(tiny_config("dense", num_layers=2))
    folder = export(source, tmp_path / "a", 2)
    (folder / "mp_rank_01" / FILE_NAME).unlink()
    with pytest.raises(CheckpointError, match="incomplete: mp_rank_01 missing"):
        MegatronReader(tmp_path / "a")
    path = export(source, tmp_path / "b") / "mp_rank_00" / FILE_NAME
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"model_optim_rng\.pt cannot be read"):
        MegatronReader(tmp_path / "b")
    torch.save({"args": argparse.Namespace()}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before version 1\.6"):
        MegatronReader(tmp_path / "b")
    with pytest.raises(CheckpointError, match="not a checkpoint of Megatron's"):
        MegatronReader(tmp_path / "nowhere")
    (tmp_path / "c" / "iter_0000003").mkdir(parents=True)
    (tmp_path / "c" / "iter_0000003" / "metadata.json").write_text("{}")
    (tmp_path / "c" / "latest_checkpointed_iteration.txt").write_text("3")
    with pytest.raises(CheckpointError, match=r"metadata\.json says sharded_backend None; torch_dist is read"):
        MegatronReader(tmp_path / "c")


@pytest.mark.parametrize(
    "wrong",
    [{"num_layers": 10**9}, {"num_query_groups": 3}, {"moe_router_topk": 99}, {"num_experts": 0}, {"hidden_size": "x"}],
)
def test_a_wrong_argument_is_refused_by_the_file_that_has_it(wrong: dict[str, object], tmp_path: Path) -> None:
    path = export(new_source(tiny_config("moe", style="llama")), tmp_path) / "mp_rank_00" / FILE_NAME
    content = torch.load(path, weights_only=False)
    torch.save({**content, "args": argparse.Namespace(**{**vars(content["args"]), **wrong})}, path)
    with pytest.raises(MegatronSamoeError, match="mp_rank_00"):
        MegatronReader(tmp_path)


def test_mutated_files_are_read_or_refused_in_words(tmp_path: Path) -> None:
    path = export(new_source(tiny_config("dense", num_layers=2)), tmp_path) / "mp_rank_00" / FILE_NAME
    good, random_ = path.read_bytes(), random.Random(0)
    with zipfile.ZipFile(path) as archive:
        table = archive.getinfo("archive/data.pkl")
    refused = 0
    for trial in range(80):
        content = bytearray(good)
        if trial % 4 == 0:
            content = content[: random_.randrange(len(content))]
        elif trial % 4 == 1:
            content[-1 - random_.randrange(3000)] ^= 255
        for _ in range((0, 0, 1, 20)[trial % 4]):
            content[table.header_offset + random_.randrange(table.file_size)] = random_.randrange(256)
        path.write_bytes(content)
        try:
            reader = MegatronReader(tmp_path)
            for name in reader.tensors:
                reader.read(name)
        except (CheckpointError, ConfigError) as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 40


@pytest.mark.parametrize(
    ("options", "sizes", "style", "message"),
    [
        ({}, (3, 1, 1), None, "--target-tensor-parallel-size = 3"),
        ({}, (1, 3, 1), None, "must divide --num-layers 4"),
        ({}, (1, 1, 3), None, "must divide --num-experts 4"),
        ({}, (0, 1, 1), None, "positive integer"),
        ({}, (2, 1, 1, 2), None, "does not split experts with biases"),
        ({"style": "llama"}, (4, 1, 1), None, "must divide --num-query-groups 2"),
        ({"style": "llama"}, (2, 1, 1, 3), None, "must be 1 or 2, the tensor-parallel size"),
        ({}, (1, 1, 1), LEGACY, "has no bias"),
        ({"moe_shared_expert_intermediate_size": 8}, (1, 1, 1), None, "shared experts have no bias"),
        ({"moe_router_score_function": "sigmoid", "moe_router_topk": 2, "moe_router_pre_softmax": True}, (1, 1, 1), None,
         "always normalises"),
    ],
)  # fmt: skip
def test_exports_that_megatron_cannot_hold_are_refused(
    options: dict, sizes: tuple, style: MegatronStyle | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(new_source(tiny_config("moe", **options)), tmp_path / "out", *sizes, style=style)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("chunks", [0, 3, 4])
def test_chunks_that_do_not_divide_the_layers_are_refused(chunks: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must divide the 2 layers of each of 2 pipeline ranks"):
        export(new_source(tiny_config("moe")), tmp_path, 1, 2, 1, virtual_pipeline=chunks)
    with pytest.raises(ConfigError, match="be 1 for one rank"):
        export(new_source(tiny_config("moe")), tmp_path, 1, 1, 1, virtual_pipeline=2)


def test_files_of_other_ranks_and_iterations_are_named(tmp_path: Path) -> None:
    source = new_source(tiny_config("dense", num_layers=2))
    folder = export(source, tmp_path, 2, 2, 1)
    shutil.copytree(folder / "mp_rank_01_001", folder / "mp_rank_02_001")
    with pytest.raises(
        CheckpointError, match=r"files of other ranks than it should: mp_rank_02_001 \(its arguments say"
    ):
        MegatronReader(tmp_path)
    shutil.rmtree(folder / "mp_rank_02_001")
    rewrite(folder / "mp_rank_01_000", lambda c: c.update(iteration=9))
    with pytest.raises(CheckpointError, match="is mixed: iteration is 9 in mp_rank_01_000 and 7 in another"):
        MegatronReader(tmp_path)


def test_each_tensor_is_read_once_and_files_are_torchs(tmp_path: Path) -> None:
    asked: list[str] = []

    class Counting(MemorySource):
        def read(self, name: str) -> torch.Tensor:
            asked.append(name)
            return super().read(name)

    source = new_source(tiny_config("moe"), dtype=torch.bfloat16)
    folder = export(Counting(source.weights, source.config, source.train_state), tmp_path, 2, 2, 2)
    tied = {"embedding.word.weight": 2}  # the first and the last stage have it
    assert {name: asked.count(name) for name in asked} == {name: tied.get(name, 1) for name in asked}
    for path in folder.rglob(FILE_NAME):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            records = [entry.filename.partition("/")[2] for entry in archive.infolist()]
        file = torch._C.PyTorchFileReader(str(path))
        offsets = [file.get_record_offset(name) for name in records if name.startswith("data/")]
        assert len(offsets) > 20 and not any(offset % 64 for offset in offsets)
        mapped, read = (torch.load(path, weights_only=False, mmap=mmap)["model"] for mmap in (True, False))
        for name, tensor in read.items():
            assert tensor is None or torch.equal(tensor, mapped[name])


def test_existing_iterations_stay_and_failures_leave_nothing(tmp_path: Path) -> None:
    source = new_source(tiny_config("dense", num_layers=2))
    export(source, tmp_path)
    with pytest.raises(CheckpointError, match="exists"):
        export(source, tmp_path)
    del source.weights["final_norm.bias"]
    broken = plan_export(new_source(tiny_config("dense", num_layers=2)), MegatronLayout())
    broken.source.weights.pop("final_norm.weight")
    with pytest.raises(KeyError):
        write_export(broken, tmp_path, 8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000007", "latest_checkpointed_iteration.txt"]
