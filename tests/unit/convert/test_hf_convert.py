"""The conversion tool: plans, progress, memory, and every kind of bad input explained in a paragraph."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from megatron_samoe.cli import convert
from megatron_samoe.convert.hf import export
from megatron_samoe.convert.megatron import MegatronReader
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.convert.read_ahead import ReadAhead
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors, write_checkpoint
from megatron_samoe.errors import CheckpointError
from tests.harness.megatron_files import write_rank_files
from tests.harness.program import REPOSITORY
from tests.harness.tables import table
from tests.harness.tiny import VOCAB_SIZE, tiny_config
from tests.unit.convert.memory_source import load, new_source

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


Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the tool and returns its status and both outputs."""

    def call(*arguments: object) -> SimpleNamespace:
        capsys.readouterr()
        status = convert.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(status=status, out=captured.out, err=captured.err)

    return call


def assert_refused(result: SimpleNamespace, message: str) -> None:
    """A failure is one paragraph on standard error."""
    assert result.status != 0 and result.err.startswith("error: ") and message in result.err, result.err
    assert result.err.strip().count("\n") == 0


def assert_same(a: GlobalTensors, b: GlobalTensors) -> None:
    theirs, ours = load(a).global_parameters(), load(b).global_parameters()
    for name in ours:
        rows = VOCAB_SIZE if name in ("embedding.word.weight", "output.weight") else None
        assert torch.equal(theirs[name][:rows], ours[name][:rows]), name


def test_families_are_found_out(made: SimpleNamespace, run: Run, tmp_path: Path) -> None:
    result = run("--load-dir", made.hf, "--save-dir", tmp_path / "a")
    assert result.status == 0 and f"From a Hugging Face folder in {made.hf}." in result.out
    assert f"To a checkpoint of this program in {tmp_path / 'a' / 'iter_0000007'}." in result.out
    assert_same(open_folder(tmp_path / "a").tensors, made.source)
    result = run("--load-dir", made.megatron, "--save-dir", tmp_path / "b")
    assert "From a checkpoint of Megatron-LM (format torch)" in result.out
    result = run("--load-dir", tmp_path / "b" / "iter_0000007", "--save-dir", tmp_path / "c", "--to", "torch_dist")
    assert "Megatron-LM's format torch_dist" in result.out
    assert_same(MegatronReader(tmp_path / "c"), open_folder(tmp_path / "b").tensors)
    result = run("--load-dir", made.native, "--save-dir", tmp_path / "d", "--hf-model-type", "mixtral")
    assert "MixtralForCausalLM" in result.out and "mixtral was asked for" in result.out
    assert "Its optimizer state (" in result.out and "(0 " not in result.out


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["--to", "hf"], "model.expert_pool.bank.gate_up_proj  [8, 96, 32] float32"),
        (["--fold"], "model.layers.*.block_sparse_moe.experts.*.w1.weight  [48, 32] float32  x 8"),
        (["--to", "hf", "--dtype", "bf16"], "model.layers.*.mlp.router.weight  [4, 32] bfloat16  x 2"),
        (["--to", "torch_dist"], "iter_0000007: "),
    ],
)
def test_a_dry_run_shows_the_plan_and_writes_nothing(
    options: list[str], shown: str, made: SimpleNamespace, run: Run, tmp_path: Path
) -> None:
    result = run("--load-dir", made.native, "--save-dir", tmp_path / "new", "--dry-run", *options)
    assert result.status == 0 and shown in result.out and result.out.endswith("Nothing is written (--dry-run).\n")
    assert not list(tmp_path.iterdir())


def test_progress_ends_at_all_bytes(made: SimpleNamespace, run: Run, tmp_path: Path) -> None:
    for options in (["--to", "hf"], ["--to", "torch_dist"], ["--fold", "--max-shard-size", "20KB"]):
        result = run("--load-dir", made.native, "--save-dir", tmp_path / options[-1], *options)
        assert "100%" in result.err
    assert "100%" in run("--load-dir", made.hf, "--save-dir", tmp_path / "native").err


def test_shards_are_as_large_as_asked_for(made: SimpleNamespace, run: Run, tmp_path: Path) -> None:
    run("--load-dir", made.native, "--save-dir", tmp_path / "hf", "--fold", "--max-shard-size", "30KB")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "hf" / file).stat().st_size < 36_000 for file in files)
    assert index["metadata"]["total_size"] == sum(
        t.num_bytes for t in export.plan_export(made.source, fold=True).tensors.values()
    )


@pytest.mark.parametrize(("options", "message"), TABLE["bad requests"])
def test_bad_requests_are_explained(
    options: list[str], message: str, made: SimpleNamespace, run: Run, tmp_path: Path
) -> None:
    filled = [option.format(**vars(made)) for option in options]
    assert_refused(run("--save-dir", tmp_path / "new", *filled), message)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("former", [["--to=megatron"], ["--to", "megatron"], ["--target-tensor-parallel-size", "2"]])
def test_per_rank_files_have_another_way(former: list[str], made: SimpleNamespace, capsys: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        convert.main(["--load-dir", str(made.native), "--save-dir", str(tmp_path / "new"), *former])
    assert "convert --to torch_dist, and run its pretrain_gpt.py" in capsys.readouterr().err


def test_what_is_there_is_never_overwritten(made: SimpleNamespace, run: Run) -> None:
    before = {path: path.read_bytes() for path in made.root.rglob("*") if path.is_file()}
    for save, options in (
        ("hf", ["--to", "hf"]),
        ("megatron", ["--to", "torch_dist"]),
        ("hf/config.json", ["--to", "hf"]),
    ):
        assert_refused(run("--load-dir", made.native, "--save-dir", made.root / save, *options), "exists")
    assert_refused(run("--load-dir", made.hf, "--save-dir", made.native), "iter_0000007 exists")
    assert before == {path: path.read_bytes() for path in made.root.rglob("*") if path.is_file()}


TARGETS = [("native", ["--to", "hf"]), ("native", ["--to", "torch_dist"]), ("hf", ["--to", "native"])]


@pytest.mark.parametrize(("source", "options"), TARGETS)
def test_no_space_is_noticed_before_writing(
    source: str, options: list[str], made: SimpleNamespace, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=32 << 20))
    result = run("--load-dir", made.root / source, "--save-dir", tmp_path / "new", *options)
    assert (
        result.status == 1
        and "are to be written beside 33.6 MB that stay free, and the disk has 33.6 MB left" in result.err
    )
    assert (
        not list(tmp_path.rglob("*.safetensors"))
        and not list(tmp_path.rglob("*.pt"))
        and not list(tmp_path.rglob("*.distcp"))
    )


@pytest.mark.parametrize(("source", "options"), TARGETS)
def test_a_place_that_cannot_be_written_is_named(
    source: str, options: list[str], made: SimpleNamespace, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    result = run("--load-dir", made.root / source, "--save-dir", tmp_path / "file" / "new", *options)
    assert result.status == 1 and "error: " in result.err and "Not a directory" in result.err


def copied(made: SimpleNamespace, family: str, to: Path) -> Path:
    shutil.copytree(getattr(made, family), to)
    return to


def edited_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_newer_formats_are_refused(made: SimpleNamespace, run: Run, tmp_path: Path) -> None:
    folder = copied(made, "native", tmp_path / "native")
    edited_json(folder / "iter_0000007" / "train_state.json", format_version=99)
    result = run("--load-dir", folder, "--save-dir", tmp_path / "new", "--to", "hf")
    assert_refused(result, "has format version 99; this program reads up to 2")


def flipped(path: Path, at: float = 0.5) -> None:
    """Changes one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


def test_damaged_sources_leave_nothing_behind(made: SimpleNamespace, run: Run, tmp_path: Path) -> None:
    folder = copied(made, "native", tmp_path / "native")
    flipped(next(folder.rglob("*.distcp")))
    for options in (["--to", "hf"], ["--to", "torch_dist"]):
        result = run("--load-dir", folder, "--save-dir", tmp_path / "new", *options)
        assert result.status == 1 and "is damaged" in result.err, result.err
        assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.pt"))
    folder = copied(made, "hf", tmp_path / "hf")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(run("--load-dir", folder, "--save-dir", tmp_path / "new"), "is damaged, or is cut off")
    folder = copied(made, "megatron", tmp_path / "megatron")
    path = next(folder.rglob("*.pt"))
    path.write_bytes(path.read_bytes()[:-2000])
    assert_refused(run("--load-dir", folder, "--save-dir", tmp_path / "new"), "model_optim_rng.pt cannot be read")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "new") == ["hf", "megatron", "native"]


class Bomb:
    """Unpickling it would create a file."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("exploded"),))


def test_pickles_are_refused(made: SimpleNamespace, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copied(made, "megatron", tmp_path / "megatron")
    path = next(folder.rglob("*.pt"))
    torch.save({**torch.load(path, weights_only=False), "more": Bomb()}, path)
    assert_refused(run("--load-dir", folder, "--save-dir", tmp_path / "new"), "which could run any code")
    folder = copied(made, "hf", tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    torch.save({"model.final_norm.weight": Bomb()}, folder / "pytorch_model.bin")
    assert_refused(run("--load-dir", folder, "--save-dir", tmp_path / "new"), "A pickle can run any code")
    assert not Path("exploded").exists()


@pytest.mark.parametrize(("changes", "message"), TABLE["misfits"])
def test_configurations_that_do_not_fit_are_named(
    changes: dict[str, Any], message: str, made: SimpleNamespace, run: Run, tmp_path: Path
) -> None:
    folder = copied(made, "hf", tmp_path / "hf")
    edited_json(folder / "config.json", **changes)
    assert_refused(run("--load-dir", folder, "--save-dir", tmp_path / "new"), message)


def test_a_tensor_without_a_place_is_named(made: SimpleNamespace, run: Run, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(made, "hf", tmp_path / "hf")
    file = min(folder.glob("*.safetensors"))
    save_file({**load_file(file), "model.layers.0.mlp.other": torch.zeros(2)}, file, {"format": "pt"})
    result = run("--load-dir", folder, "--save-dir", tmp_path / "new")
    assert_refused(result, "tensors that a samoe model of its config.json has no place for: model.layers.0.mlp.other")


def test_what_an_export_remembers_counts_only_for_its_own_model(
    made: SimpleNamespace, run: Run, tmp_path: Path
) -> None:
    folder = copied(made, "hf", tmp_path / "hf")
    edited_json(folder / "config.json", rotary_base=500.0)
    result = run("--load-dir", folder, "--save-dir", tmp_path / "a")
    assert "megatron_samoe.json describes another model than config.json, which is followed." in result.out
    reader = open_folder(tmp_path / "a").tensors
    assert reader.config["model"]["rotary_base"] == 500.0 and reader.train_state["iteration"] == 0
    for content in ("{}", json.dumps({"version": 1, "config": {"modell": {}}, "train_state": {"vocab_size": 9}})):
        (folder / "megatron_samoe.json").write_text(content)
        assert run("--load-dir", folder, "--save-dir", tmp_path / content[:9].strip("{").replace('"', "x")).status == 0


def test_a_missing_tensor_of_ours_is_named(made: SimpleNamespace) -> None:
    source = new_source(SAMOE)
    del source.weights["layers.1.moe.router.weight"]
    with pytest.raises(
        CheckpointError, match=r"has no layers\.1\.moe\.router\.weight, which its config\.yaml says \(1 missing\)"
    ):
        export.plan_export(source)


def test_other_precisions_keep_what_training_keeps(made: SimpleNamespace, run: Run, tmp_path: Path) -> None:
    assert run("--load-dir", made.hf, "--save-dir", tmp_path / "native", "--dtype", "bf16").status == 0
    reader = open_folder(tmp_path / "native").tensors
    config = yaml.safe_load((reader.directory / "config.yaml").read_text())
    assert config["training"]["bf16"]
    assert reader.tensors["layers.0.attention.qkv.weight"].dtype == torch.bfloat16
    for name in ("layers.0.moe.router.weight", "layers.0.moe.combination"):
        assert torch.equal(reader.read(name), made.source.weights[name])
    assert (
        run(
            "--load-dir", made.native, "--save-dir", tmp_path / "megatron", "--to", "torch_dist", "--dtype", "bf16"
        ).status
        == 0
    )
    files = MegatronReader(tmp_path / "megatron")
    assert files.tensors["layers.0.attention.qkv.weight"].dtype == torch.bfloat16


def test_reading_ahead_gives_each_tensor_once_and_its_errors() -> None:
    source = new_source(SAMOE)
    names, asked = list(source.weights), []

    class Counted:
        config, train_state, tensors = source.config, source.train_state, source.tensors
        attachments: dict[str, bytes] = {}  # noqa: RUF012

        def read(self, name: str) -> torch.Tensor:
            asked.append(name)
            return source.read(name)

    with ReadAhead(Counted(), names) as ahead:
        assert all(torch.equal(ahead.read(name), source.weights[name]) for name in names)
        assert asked == names
        # In another order too, at the price of reading for nothing.
        assert all(torch.equal(ahead.read(name), source.weights[name]) for name in reversed(names))
        with pytest.raises(KeyError, match="nothing"):
            ahead.read("nothing")
    with pytest.raises(RuntimeError, match="shutdown"):
        ahead.read(names[0])


def test_tensors_stream_through_the_memory_of_a_few(tmp_path: Path) -> None:
    """In a process of its own: 77 MB of weights may take memory up by two of the largest tensors and a little."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from Linux's /proc")

    def measure(folder: Path) -> dict[str, Any]:
        command = [sys.executable, "-m", "tests.unit.convert.hf_peak", str(folder)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def excess(measured: dict[str, Any]) -> dict[str, int]:
        most = {
            n: 2 * measured["samoe_largest" if n.startswith("samoe") else "largest"] + (16 << 20)
            for n in measured["rises"]
        }
        assert max(most.values()) < measured["total"], measured
        return {name: rise - most[name] for name, rise in measured["rises"].items() if rise >= most[name]}

    # A machine that others load can only add to it: what was too much must be so again.
    if first := excess(measure(tmp_path / "first")):
        again = excess(measure(tmp_path / "again"))
        assert not set(first) & set(again), (first, again)
