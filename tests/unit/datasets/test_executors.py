"""How a run copes with workers that die, standard input, and tokenizers that fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_samoe.datasets.indexed_dataset import IndexedDataset
from megatron_samoe.datasets.preprocess import run
from megatron_samoe.datasets.preprocess.checksums import combine
from megatron_samoe.datasets.preprocess.executors import InlineExecutor
from megatron_samoe.datasets.preprocess.options import PreprocessOptions
from megatron_samoe.errors import DataError

ROOT = Path(__file__).resolve().parents[3]


def corpus(path: Path, count: int = 40) -> Path:
    path.write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(count)))
    return path


def options(tmp_path: Path, **values: object) -> PreprocessOptions:
    defaults: dict[str, object] = {"executor": "inline", "chunk_bytes": 200, "quiet": True}
    return PreprocessOptions((str(tmp_path / "in.jsonl"),), str(tmp_path / "out"), **(defaults | values))  # type: ignore


class _Dying(InlineExecutor):
    """Dies at chosen messages: (kind, chunk number) -> how often."""

    plan: dict[tuple[str, int], int]
    restarts = 0
    is_dead = False

    def send(self, worker: int, message: tuple) -> None:
        if self.is_dead:
            return  # a closed connection swallows messages
        number = message[1].number if message[0] == "chunk" else message[1]
        if type(self).plan.get((message[0], number), 0) > 0:
            type(self).plan[message[0], number] -= 1
            self.is_dead = True
            self._answers.append((0, ("died", "it was ended by SIGKILL")))
        else:
            super().send(worker, message)

    def restart(self, worker: int) -> None:
        type(self).restarts += 1
        self.is_dead = False
        self.start()


@pytest.mark.parametrize("kind", ["chunk", "write"])
def test_a_death_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    corpus(tmp_path / "in.jsonl")
    run.preprocess(options(tmp_path))
    wanted = (tmp_path / "out_text_document.bin").read_bytes(), (tmp_path / "out_text_document.idx").read_bytes()
    _Dying.plan, _Dying.restarts = {(kind, 3): 1, (kind, 9): 1}, 0
    monkeypatch.setattr(run, "make_executor", _Dying)
    run.preprocess(options(tmp_path))
    assert _Dying.restarts == 2
    assert wanted == (
        (tmp_path / "out_text_document.bin").read_bytes(),
        (tmp_path / "out_text_document.idx").read_bytes(),
    )


def test_a_chunk_that_ends_two_workers_is_named_and_the_rest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus(tmp_path / "in.jsonl")
    _Dying.plan = {("chunk", 9): 5}
    with monkeypatch.context() as patch:
        patch.setattr(run, "make_executor", _Dying)
        with pytest.raises(
            DataError, match=r"Workers died 2 times while they held chunk 9 .*in\.jsonl from byte .* fewer --workers"
        ):
            run.preprocess(options(tmp_path))
    assert len((tmp_path / "out.preprocess.journal").read_text().splitlines()) >= 9
    run.preprocess(options(tmp_path, resume=True))
    assert IndexedDataset(str(tmp_path / "out_text_document")).num_documents == 40


def test_a_document_that_the_tokenizer_refuses_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """As Rust's panics come: outside Exception."""

    from megatron_samoe.datasets.tokenizer import ByteTokenizer

    real = ByteTokenizer.encode_arrays

    def fails(self: ByteTokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if any("document 7" in text for text in texts):
            raise Panic("index out of range")
        return real(self, texts)

    monkeypatch.setattr(ByteTokenizer, "encode_arrays", fails)
    corpus(tmp_path / "in.jsonl", 20)
    with pytest.raises(DataError, match=r"in\.jsonl:8: the tokenizer failed: Panic: index out of range"):
        run.preprocess(options(tmp_path))
    report = run.preprocess(options(tmp_path, on_bad_input="skip"))
    assert report.totals.num_bad == 1 and report.num_documents == 19


def test_ids_outside_the_vocabulary_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_samoe.datasets.tokenizer import ByteTokenizer

    monkeypatch.setattr(ByteTokenizer, "vocab_size", 50)
    corpus(tmp_path / "in.jsonl")
    with pytest.raises(DataError, match="outside its vocabulary of 50"):
        run.preprocess(options(tmp_path))


def _tool(tmp_path: Path, *more: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [
        sys.executable,
        str(ROOT / "tools/preprocess_data.py"),
        "--tokenizer-type",
        "ByteTokenizer",
        "--workers",
        "1",
        "--overwrite",
    ]
    return subprocess.run([*command, "--output-prefix", str(tmp_path / "out"), *more], input=stdin, capture_output=True)


def test_standard_input(tmp_path: Path) -> None:
    text = corpus(tmp_path / "in.jsonl").read_bytes()
    assert b"needs --input-format" in _tool(tmp_path, "--input", "-", stdin=text).stderr
    assert (
        b"cannot be used with standard input"
        in _tool(tmp_path, "--input", "-", "--input-format", "jsonl", "--resume").stderr
    )
    done = _tool(tmp_path, "--input", "-", "--input-format", "jsonl", stdin=text)
    assert done.returncode == 0 and b"40 documents" in done.stdout
    assert IndexedDataset(str(tmp_path / "out_text_document")).num_documents == 40


def test_errors_of_worker_processes_are_one_paragraph(tmp_path: Path) -> None:
    corpus(tmp_path / "in.jsonl")
    words = ["--input", str(tmp_path / "in.jsonl"), "--executor", "process", "--languages", "xx"]
    failed = _tool(tmp_path, *words)
    assert failed.returncode == 1 and failed.stderr.startswith(b"error: ") and b"Traceback" not in failed.stderr
    assert not list(tmp_path.glob("out*"))


def test_checksums_of_joined_pieces() -> None:
    import zlib

    random = np.random.default_rng(0)
    for first, second in random.integers(0, 5000, (50, 2)).tolist():
        a, b = random.bytes(first), random.bytes(second)
        assert combine(zlib.crc32(a), zlib.crc32(b), second) == zlib.crc32(a + b)
