"""The conversion tool: plans, progress, memory, every kind of bad input explained in a paragraph; and that the class of an export
follows from what the model computes."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml

from megatron_samoe.cli import convert
from megatron_samoe.config.data import DataConfig
from megatron_samoe.convert.hf import export
from megatron_samoe.convert.hf.families.llama import LLAMA
from megatron_samoe.convert.hf.source import derived_model
from megatron_samoe.convert.hf.target import choose_target
from megatron_samoe.convert.hf.tokenizer_files import imported_tokenizer
from megatron_samoe.convert.megatron import MegatronReader
from megatron_samoe.convert.native import NativeModel
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.convert.output_folder import require_new
from megatron_samoe.convert.read_ahead import ReadAhead
from megatron_samoe.dist_checkpointing.global_tensors import write_checkpoint
from megatron_samoe.errors import CheckpointError, ConfigError
from tests.harness.megatron_files import write_rank_files
from tests.harness.pairs import first_by_day
from tests.harness.program import REPOSITORY, call, flags, flip_bit
from tests.harness.ranks import run_ranks
from tests.harness.tables import table
from tests.harness.tiny import VOCAB_SIZE, tiny_config
from tests.unit.convert.memory_source import new_source

TABLE = table(__file__)
SAMOE = tiny_config("samoe", style="llama", moe_router_topk=2, moe_ffn_hidden_size=48, num_layers=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One model in all three families."""
    root = tmp_path_factory.mktemp("made")
    source = new_source(SAMOE)
    write_checkpoint(root / "native", 7, source)
    assert convert.main(["--load-dir", str(root / "native"), "--save-dir", str(root / "hf"), "--to", "hf"]) == 0
    write_rank_files(source, root / "megatron")
    return SimpleNamespace(root=root, source=source, native=root / "native", hf=root / "hf", megatron=root / "megatron")


def run(*words: object) -> subprocess.CompletedProcess[str]:
    """Returns the tool's exit status and both outputs."""
    return call("megatron_samoe.cli.convert", *map(str, words))


def assert_refused(result: subprocess.CompletedProcess[str], message: str) -> None:
    """A failure is one paragraph on standard error."""
    assert result.returncode != 0 and result.stderr.startswith("error: ") and message in result.stderr, result.stderr
    assert result.stderr.strip().count("\n") == 0


@pytest.mark.parametrize(("options", "shown"), TABLE["dry runs"])
def test_a_dry_run_shows_the_plan_and_writes_nothing(
    options: list[str], shown: str, made: SimpleNamespace, tmp_path: Path
) -> None:
    result = run("--load-dir", made.native, "--save-dir", tmp_path / "new", "--dry-run", *options)
    assert result.returncode == 0 and shown in result.stdout and "Nothing is written" in result.stdout
    assert not list(tmp_path.iterdir())


def test_progress_ends_at_all_bytes(made: SimpleNamespace, tmp_path: Path) -> None:
    for options in (["--to", "hf"], ["--to", "torch_dist"], ["--fold", "--max-shard-size", "20KB"]):
        result = run("--load-dir", made.native, "--save-dir", tmp_path / options[-1], *options)
        assert "100%" in result.stderr
    assert "100%" in run("--load-dir", made.hf, "--save-dir", tmp_path / "native").stderr


def test_shards_are_as_large_as_asked_for(made: SimpleNamespace, tmp_path: Path) -> None:
    run("--load-dir", made.native, "--save-dir", tmp_path / "hf", "--fold", "--max-shard-size", "30KB")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "hf" / file).stat().st_size < 36_000 for file in files)
    tensors = export.plan_export(made.source, fold=True).tensors
    assert index["metadata"]["total_size"] == sum(tensor.num_bytes for tensor in tensors.values())


@pytest.mark.parametrize(("options", "message"), TABLE["bad requests"])
def test_bad_requests_are_explained(options: list[str], message: str, made: SimpleNamespace, tmp_path: Path) -> None:
    filled = [option.format(**vars(made)) for option in options]
    assert_refused(run("--save-dir", tmp_path / "new", *filled), message)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("former", [["--to=megatron"], ["--to", "megatron"], ["--target-tensor-parallel-size", "2"]])
def test_per_rank_files_have_another_way(former: list[str], made: SimpleNamespace, tmp_path: Path) -> None:
    done = run("--load-dir", made.native, "--save-dir", tmp_path / "new", *former)
    assert done.returncode != 0 and "convert --to torch_dist, and run its pretrain_gpt.py" in done.stderr


def test_what_is_there_is_never_overwritten(made: SimpleNamespace) -> None:
    before = {path: path.read_bytes() for path in made.root.rglob("*") if path.is_file()}
    for save, target in (("hf", "hf"), ("megatron", "torch_dist"), ("hf/config.json", "hf")):
        assert_refused(run("--load-dir", made.native, "--save-dir", made.root / save, "--to", target), "exists")
    assert_refused(run("--load-dir", made.hf, "--save-dir", made.native), "iter_0000007 exists")
    assert before == {path: path.read_bytes() for path in made.root.rglob("*") if path.is_file()}


TARGETS = [("native", ["--to", "hf"]), ("native", ["--to", "torch_dist"]), ("hf", ["--to", "native"])]


@pytest.mark.parametrize(("source", "options"), TARGETS)
def test_a_disk_that_takes_nothing_is_noticed_before_writing(
    source: str, options: list[str], made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    result = run("--load-dir", made.root / source, "--save-dir", tmp_path / "file" / "new", *options)
    assert result.returncode == 1 and "error: " in result.stderr and "Not a directory" in result.stderr
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=32 << 20))
    result = run("--load-dir", made.root / source, "--save-dir", tmp_path / "new", *options)
    said = "are to be written beside 33.6 MB that stay free, and the disk has 33.6 MB left"
    assert result.returncode == 1 and said in result.stderr
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".pt", ".distcp")]


# The last moment: all is written, and gets its name now.
DIES_AT_RENAME = """
import os, signal, sys
from megatron_samoe.cli import convert
from megatron_samoe.config.data import DataConfig
os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
convert.main(sys.argv[1:])
"""


@pytest.mark.parametrize(("source", "options"), first_by_day(TARGETS))
def test_a_conversion_that_is_killed_leaves_no_model_and_nothing_in_the_way(
    source: str, options: list[str], made: SimpleNamespace, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    words = [*flags(load_dir=made.root / source, save_dir=new), *options]
    killed = subprocess.run([sys.executable, "-c", DIES_AT_RENAME, *words], cwd=REPOSITORY, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    left = [p for p in (new.iterdir() if new.exists() else tmp_path.glob(".new*"))]
    assert left and all(p.name.startswith(".") for p in left)
    assert_refused(run("--load-dir", new, "--save-dir", tmp_path / "other", "--dry-run"), "")
    assert run(*words).returncode == 0
    assert not list(tmp_path.rglob(".*unfinished"))


def copied(made: SimpleNamespace, family: str, to: Path) -> Path:
    shutil.copytree(getattr(made, family), to)
    return to


def edited_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_damaged_sources_leave_nothing_behind(made: SimpleNamespace, tmp_path: Path) -> None:
    folder = copied(made, "native", tmp_path / "native")
    flip_bit(next(folder.rglob("*.distcp")))
    for options in (["--to", "hf"], ["--to", "torch_dist"]):
        result = run("--load-dir", folder, "--save-dir", tmp_path / "new", *options)
        assert result.returncode == 1 and "is damaged" in result.stderr, result.stderr
        assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.pt"))
    assert [p.name for p in tmp_path.iterdir() if p.name != "new"] == ["native"]


@pytest.mark.parametrize(("changes", "message"), TABLE["misfits"])
def test_configurations_that_do_not_fit_are_named(
    changes: dict[str, Any], message: str, made: SimpleNamespace, tmp_path: Path
) -> None:
    folder = copied(made, "hf", tmp_path / "hf")
    edited_json(folder / "config.json", **changes)
    assert_refused(run("--load-dir", folder, "--save-dir", tmp_path / "new"), message)


def test_a_tensor_without_a_place_is_named(made: SimpleNamespace, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(made, "hf", tmp_path / "hf")
    file = min(folder.glob("*.safetensors"))
    save_file({**load_file(file), "model.layers.0.mlp.other": torch.zeros(2)}, file, {"format": "pt"})
    result = run("--load-dir", folder, "--save-dir", tmp_path / "new")
    assert_refused(result, "tensors that a samoe model of its config.json has no place for: model.layers.0.mlp.other")


def test_what_an_export_remembers_counts_only_for_its_own_model(made: SimpleNamespace, tmp_path: Path) -> None:
    folder = copied(made, "hf", tmp_path / "hf")
    edited_json(folder / "config.json", rotary_base=500.0)
    result = run("--load-dir", folder, "--save-dir", tmp_path / "a")
    assert "megatron_samoe.json describes another model than config.json, which is followed." in result.stdout
    reader = open_folder(tmp_path / "a").tensors
    assert reader.config["model"]["rotary_base"] == 500.0 and reader.train_state["iteration"] == 0
    other = {"version": 1, "config": {"modell": {}}, "train_state": {"vocab_size": 9}}
    for name, content in (("b", {}), ("c", other)):
        (folder / "megatron_samoe.json").write_text(json.dumps(content))
        assert run("--load-dir", folder, "--save-dir", tmp_path / name).returncode == 0


def test_small_things_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written: File name too long"):
        require_new(tmp_path / ("x" * 300))
    with pytest.raises(ConfigError, match="num_attention_heads"):
        derived_model(LLAMA, {"num_attention_heads": 0, "hidden_size": 32})
    (tmp_path / "tokenizer.json").write_text("junk")
    _, line = imported_tokenizer(DataConfig(tokenizer_type="ByteTokenizer"), tmp_path, tmp_path / "kept")
    assert "The folder's tokenizer cannot be used" in line


def test_a_missing_tensor_of_ours_is_named(made: SimpleNamespace) -> None:
    source = new_source(SAMOE)
    del source.weights["layers.1.moe.router.weight"]
    said = r"has no layers\.1\.moe\.router\.weight, which its config\.yaml says \(1 missing\)"
    with pytest.raises(CheckpointError, match=said):
        export.plan_export(source)


def test_other_precisions_keep_what_training_keeps(made: SimpleNamespace, tmp_path: Path) -> None:
    assert run("--load-dir", made.hf, "--save-dir", tmp_path / "native", "--dtype", "bf16").returncode == 0
    reader = open_folder(tmp_path / "native").tensors
    config = yaml.safe_load((reader.directory / "config.yaml").read_text())
    assert config["training"]["bf16"]
    assert reader.tensors["layers.0.attention.qkv.weight"].dtype == torch.bfloat16
    for name in ("layers.0.moe.router.weight", "layers.0.moe.combination"):
        assert torch.equal(reader.read(name), made.source.weights[name])
    words = ("--load-dir", made.native, "--save-dir", tmp_path / "megatron", "--to", "torch_dist", "--dtype", "bf16")
    assert run(*words).returncode == 0
    files = MegatronReader(tmp_path / "megatron")
    assert files.tensors["layers.0.attention.qkv.weight"].dtype == torch.bfloat16


#: Conversions of many tensors: from, to, and how.
STREAMED = TABLE["streamed"]


def rises(root: Path, out: Path) -> dict[str, int]:
    """Returns how far each conversion takes this process's memory above where it was, at the highest."""
    found = {}
    for size, (name, (load_dir, save_dir, *words)) in product(
        ("small", "large"), STREAMED.items()
    ):  # code is loaded by then
        source, target = (out if load_dir == "hf" else root) / size / load_dir, out / size / save_dir
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before = psutil.Process().memory_info().rss
        done = call("megatron_samoe.cli.convert", "--load-dir", str(source), "--save-dir", str(target), *words)
        assert done.returncode == 0, done.stderr
        peak_kb = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        assert peak_kb is not None
        found[name] = int(peak_kb[1]) * 1024 - before
    return found


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_tensors_stream_through_the_memory_of_a_few(tmp_path: Path) -> None:
    """In a process of its own: weights may take memory up by two of the largest tensors and a little."""
    sizes = {}
    large = {"num_layers": 6, "hidden_size": 128, "ffn_hidden_size": 2048, "num_experts": 8}
    for layout, (size, options) in product(("moe", "samoe"), (("small", {}), ("large", large))):
        source = new_source(tiny_config(layout, style="llama", moe_router_topk=2, **options))
        write_checkpoint(tmp_path / size / layout, 1, source)
        sizes[layout] = [tensor.num_bytes for tensor in source.tensors.values()]

    def excess(out: Path) -> set[str]:
        (found,) = run_ranks(rises, 1, tmp_path, out)
        most = {n: 2 * max(sizes["samoe" if n.startswith("samoe") else "moe"]) + (16 << 20) for n in found}
        assert max(most.values()) < sum(sizes["moe"])
        return {name for name, rise in found.items() if rise >= most[name]}

    # A machine that others load can only add to it: what was too much must be so again.
    if first := excess(tmp_path / "first"):
        assert not first & excess(tmp_path / "again")


MOE: dict[str, Any] = {"style": "llama", "moe_router_topk": 2}


def model(layout: str, **options: Any) -> NativeModel:
    return NativeModel(tiny_config(layout, **options), VOCAB_SIZE)


@pytest.mark.parametrize(("layout", "options", "family"), TABLE["taken"])
def test_auto_takes_the_stock_class_that_computes_the_same(layout: str, options: dict[str, Any], family: str) -> None:
    target = choose_target(model(layout, **options))
    assert target.family.name == family and not target.fold
    if layout == "moe":
        folded = choose_target(model("samoe", **options), fold=True)
        assert folded.family.name == family and folded.fold


def test_a_pool_is_kept_unless_folding_is_asked_for() -> None:
    kept = choose_target(model("samoe", **MOE))
    assert kept.family.name == "samoe" and not kept.fold and "keeps what layers share" in kept.why[-1]
    assert choose_target(model("samoe", **MOE), "samoe", fold=True).fold
    implied = choose_target(model("samoe", **MOE), "mixtral")
    assert implied.family.name == "mixtral" and implied.fold and "folded" in implied.why[-1]


def test_reasons_name_what_each_class_lacks() -> None:
    why = choose_target(model("moe", **MOE, moe_layer_freq="2")).why
    assert why[0] == "not mixtral: --moe-layer-freq 2 (all of its layers are MoE)"
    assert why[-1] == "qwen2_moe computes the same function" and not any("llama" in line for line in why)


@pytest.mark.parametrize(("layout", "options", "wanted", "fold", "message"), TABLE["refused"])
def test_impossible_targets_are_refused(
    layout: str, options: dict[str, Any], wanted: str, fold: bool, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_target(model(layout, **options), wanted, fold)


def test_a_source_read_ahead_gives_each_tensor_in_any_order() -> None:
    names = ["a", "b", "c"]
    read: list[str] = []

    def of_source(name: str) -> Any:
        read.append(name)
        return torch.tensor(float(ord(name)))

    tensors = dict.fromkeys(names, SimpleNamespace(num_bytes=4))
    source: Any = SimpleNamespace(config={}, train_state={}, attachments={}, tensors=tensors, read=of_source)
    for order in ("abc", "cab", "acb", "aab"):
        read.clear()
        with ReadAhead(source, names) as ahead:
            assert [float(ahead.read(name)) for name in order] == [ord(name) for name in order]
        assert order != "abc" or read == names, "none twice"
