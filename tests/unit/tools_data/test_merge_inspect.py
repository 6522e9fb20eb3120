"""merge_datasets.py and inspect_dataset.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_samoe.cli import merge as merge_command
from megatron_samoe.datasets import index_format, inspect, manifest, merge
from megatron_samoe.datasets.indexed_dataset import IndexedDataset
from megatron_samoe.datasets.preprocess.run import preprocess
from megatron_samoe.errors import DataError
from tests.harness.datasets import content, jsonl, kill_9, options, preprocessed, seconds_of, write_dataset
from tests.harness.pairs import first_by_day
from tests.harness.program import call, flip_bit

ROOT = Path(__file__).resolve().parents[3]
NUM_KILLS = 8
DOCUMENTS = [[1, 2, 3, 256], [256], [7, 8, 256], [9] * 20 + [256]]


def text_dataset(folder: Path, name: str, texts: list[str]) -> str:
    return preprocessed(folder, name, texts, append_eod=True)


def test_merging_equals_preprocessing_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "parts").mkdir()
    text_dataset(tmp_path / "parts", "a", ["one", "", "two"])
    text_dataset(tmp_path / "parts", "b", ["three", "four"])
    whole = text_dataset(tmp_path, "whole", ["one", "", "two", "three", "four"])
    out = str(tmp_path / "merged")
    assert merge_command.main(["--input", str(tmp_path / "parts"), "--output-prefix", out]) == 0
    assert "5 documents" in capsys.readouterr().out
    assert content(out) == content(whole)
    assert "those of the manifest" in inspect.verify(out)[-1]
    mine, yours = manifest.read(out), manifest.read(whole)
    assert mine is not None and yours is not None
    for name in ("num_tokens", "max_token_id", "bin_crc32", "idx_crc32", "counts", "tokenizer_fingerprint"):
        assert getattr(mine, name) == getattr(yours, name), name
    assert len(list(tmp_path.glob("merged*"))) == 3, "nothing is left over"


def test_merging_a_dataset_with_gaps(tmp_path: Path) -> None:
    from megatron_samoe.datasets.index_format import IndexHeader

    header = IndexHeader(np.dtype("<u2"), 2, 2)
    rows = np.array([2, 1], "<i4").tobytes() + np.array([6, 0], "<i8").tobytes() + np.array([0, 2], "<i8").tobytes()
    (tmp_path / "g.idx").write_bytes(header.pack() + rows)
    (tmp_path / "g.bin").write_bytes(np.arange(5, dtype="<u2").tobytes())
    out = str(tmp_path / "out")
    merge.merge([str(tmp_path / "g"), write_dataset(tmp_path / "d", [[9]])], out)
    assert [row.tolist() for row in IndexedDataset(out)[:]] == [[3, 4], [0], [9]]


def test_what_cannot_be_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_dataset(tmp_path / "a", DOCUMENTS), write_dataset(tmp_path / "b", DOCUMENTS, np.int32)
    c = text_dataset(tmp_path, "c", ["x"])
    d = text_dataset(tmp_path, "d", ["x"])
    record = manifest.read(d)
    assert record is not None
    manifest.write(d, replace(record, tokenizer_fingerprint="0" * 64))
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([a, b], "different token dtypes"),
        ([c, d], "different tokenizers"),
        ([str(tmp_path / "empty")], "holds no dataset"),
        ([a, str(tmp_path / "aa")], "The nearest existing"),
        ([a, str(tmp_path / "out")], "also an input"),
    ):
        assert merge_command.main(["--input", *words, "--output-prefix", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out.bin").exists()


def test_a_merge_that_fails_leaves_what_it_would_have_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, parts = text_dataset(tmp_path, "out", ["old"]), [text_dataset(tmp_path, name, [name]) for name in ("a", "b")]
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out*")}
    assert any(name.endswith(".manifest.json") for name in before)

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_format, "write_partial_index", full)
    with pytest.raises(OSError, match="No space"):
        merge.merge(parts, out)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out*") if path.name in before} == before


@pytest.mark.parametrize(("name", "value"), [("bin_bytes", -1), ("bin_crc32", 2**61), ("idx_crc32", -1)])
def test_a_manifest_with_impossible_sizes_is_damaged(name: str, value: int, tmp_path: Path) -> None:
    prefix = text_dataset(tmp_path, "d", ["text"])
    path = Path(manifest.get_manifest_path(prefix))
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(DataError, match="is damaged"):
        merge.merge([prefix], str(tmp_path / "out"))


@pytest.mark.parametrize("num_kills", first_by_day([2, NUM_KILLS]))
def test_kill_9_while_merging_leaves_the_old_or_the_new(num_kills: int, tmp_path: Path) -> None:
    part = write_dataset(tmp_path / "part", [[1] * 1_500_000, [2] * 1_500_000])
    command = [sys.executable, str(ROOT / "tools/merge_datasets.py"), "--input", *[part] * 12]
    command += ["--output-prefix", str(tmp_path / "out")]
    whole_s, wanted = seconds_of(command), content(tmp_path / "out")
    random, killed = np.random.default_rng(int(time.time())), 0
    while killed < num_kills:
        (tmp_path / "out.bin").unlink(missing_ok=True)
        (tmp_path / "out.idx").unlink(missing_ok=True)
        killed += kill_9(command, float(random.uniform(0.1, 0.1 + whole_s)))
        assert not (tmp_path / "out.idx").exists() or content(tmp_path / "out") == wanted
    seconds_of(command)
    assert content(tmp_path / "out") == wanted


def look(action: str, prefix: str, *words: str, fault: str | None = None) -> str:
    """Returns what the command prints of a dataset; with a fault, it fails and says that."""
    done = call("megatron_samoe.cli.inspect_dataset", action, prefix, *words)
    assert done.returncode == (fault is not None) and (fault or "") in done.stderr, done
    return done.stdout


def test_statistics(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [[1, 1, 1, 1], [], [2, 2, 2, 2]])
    found = json.loads(look("stats", prefix, "--plot", str(tmp_path / "d.png")))
    assert (found["documents"], found["empty_documents"], found["tokens"], found["distinct_ids"]) == (3, 1, 8, 2)
    assert found["max_token_id"] == 2 and abs(found["unigram_entropy_nats"] - np.log(2)) < 1e-4
    assert found["document_tokens"] == {"min": 0, "p10": 0, "median": 4, "p90": 4, "max": 4}
    assert (tmp_path / "d.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_decode(tmp_path: Path) -> None:
    prefix = text_dataset(tmp_path, "d", ["one", "née"])
    assert look("decode", prefix, "--document", "1").split() == [*map(str, "née".encode()), "256"]
    assert look("decode", f"{prefix}.idx", "--document", "1", "--tokenizer-type", "ByteTokenizer") == "née\n"
    look("decode", prefix, "--document", "2", fault="not in 0 to 1")


@pytest.mark.parametrize("suffix, at", [(".bin", 3), (".idx", 60)])
def test_verify_finds_a_flipped_bit(tmp_path: Path, suffix: str, at: int) -> None:
    prefix = text_dataset(tmp_path, "d", ["one", "two", "three"])
    look("verify", prefix)
    flip_bit(Path(prefix + suffix), at)
    look("verify", prefix, fault=prefix)


def test_verify_finds_gaps_and_wrong_counts(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", DOCUMENTS)
    with open(prefix + ".bin", "ab") as file:
        file.write(b"\0\0")
    look("verify", prefix, fault="its index describes")
    prefix = text_dataset(tmp_path, "t", ["one"])
    record = manifest.read(prefix)
    assert record is not None
    manifest.write(prefix, replace(record, num_tokens=9))
    look("verify", prefix, fault="its manifest says")


def test_repair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_dataset(tmp_path / "d", DOCUMENTS)
    wanted = Path(prefix + ".idx").read_bytes()
    Path(prefix + ".idx").write_bytes(wanted[:50])
    monkeypatch.setattr(inspect, "BLOCK_BYTES", 10)
    look("repair", prefix, fault="give --dtype and --eod")
    look("repair", prefix, "--dtype", "uint16", "--eod", "256")
    assert Path(prefix + ".idx").read_bytes() == wanted
    assert Path(prefix + ".idx.broken").read_bytes() == wanted[:50]
    look("repair", prefix, "--dtype", "uint16", "--eod", "99", fault="cannot be separated")
    look("repair", str(tmp_path / "none"), "--dtype", "uint16", "--eod", "99", fault="none")
    prefix = text_dataset(tmp_path, "t", ["one", "two"])
    wanted = Path(prefix + ".idx").read_bytes()
    Path(prefix + ".idx").unlink()
    look("repair", prefix)
    assert Path(prefix + ".idx").read_bytes() == wanted


def test_the_slurm_array_and_a_merge_give_the_bytes_of_one_run(tmp_path: Path) -> None:
    """Runs the example's tasks one after another, as Slurm would."""
    tokenizer = tmp_path / "t"
    (tmp_path / "corpus").mkdir()
    for number in range(5):
        (tmp_path / f"corpus/{number}.jsonl").write_bytes(jsonl(f"file {number} document {n}" for n in range(9)))
    trainer = [sys.executable, str(ROOT / "tools/train_tokenizer.py"), "--type", "byte-bpe", "--vocab-size", "280"]
    subprocess.run([*trainer, "--input", str(tmp_path / "corpus"), "--output-prefix", str(tokenizer)], check=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "SLURM_CPUS_PER_TASK": "1"}
    arguments = [str(tmp_path / "corpus"), "*.jsonl", str(tmp_path / "web"), f"{tokenizer}.json"]
    for task in range(2):
        slurm = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "2"}
        command = ["sh", str(ROOT / "examples/preprocess_slurm.sh"), *arguments]
        subprocess.run(command, check=True, env=environment | slurm, cwd=ROOT, stdout=subprocess.DEVNULL)
    assert merge_command.main(f"--input {tmp_path}/web_parts --output-prefix {tmp_path}/merged".split()) == 0
    with_tokenizer = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": f"{tokenizer}.json"}
    preprocess(options(tmp_path, "corpus", append_eod=True, **with_tokenizer))
    assert content(tmp_path / "merged") == content(tmp_path / "out_text_document")
