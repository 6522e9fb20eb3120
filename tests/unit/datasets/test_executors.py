"""How a run copes with workers that die, standard input, tokenizers that fail, and a Ray cluster."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_samoe.cli.preprocess import main
from megatron_samoe.datasets.preprocess import run
from megatron_samoe.datasets.preprocess.executors import InlineExecutor
from megatron_samoe.datasets.tokenizer import ByteTokenizer
from megatron_samoe.errors import DataError
from tests.harness.datasets import content, decoded, jsonl, options, preprocessed

TEXTS = [f"document {n}" for n in range(40)]


@pytest.fixture(autouse=True)
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(jsonl(TEXTS))
    return path


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
    run.preprocess(options(tmp_path, "in.jsonl"))
    wanted = content(tmp_path / "out_text_document")
    _Dying.plan, _Dying.restarts = {(kind, 3): 1, (kind, 9): 1}, 0
    monkeypatch.setattr(run, "make_executor", _Dying)
    run.preprocess(options(tmp_path, "in.jsonl"))
    assert _Dying.restarts == 2 and content(tmp_path / "out_text_document") == wanted


def test_a_chunk_that_ends_two_workers_is_named_and_the_rest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _Dying.plan = {("chunk", 9): 5}
    said = r"Workers died 2 times while they held chunk 9 .*in\.jsonl from byte .* fewer --workers"
    with monkeypatch.context() as patch, pytest.raises(DataError, match=said):
        patch.setattr(run, "make_executor", _Dying)
        run.preprocess(options(tmp_path, "in.jsonl", chunk_bytes=200))
    assert len((tmp_path / "out.preprocess.journal").read_text().splitlines()) >= 9
    run.preprocess(options(tmp_path, "in.jsonl", chunk_bytes=200, resume=True))
    assert decoded(tmp_path / "out_text_document") == TEXTS


def test_a_document_that_the_tokenizer_refuses_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """As Rust's panics come: outside Exception."""

    real = ByteTokenizer.encode_arrays

    def fails(self: ByteTokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if TEXTS[7] in texts:
            raise Panic("index out of range")
        return real(self, texts)

    monkeypatch.setattr(ByteTokenizer, "encode_arrays", fails)
    with pytest.raises(DataError, match=r"in\.jsonl:8: the tokenizer failed: Panic: index out of range"):
        run.preprocess(options(tmp_path, "in.jsonl"))
    report = run.preprocess(options(tmp_path, "in.jsonl", on_bad_input="skip"))
    assert report.totals.num_bad == 1 and decoded(tmp_path / "out_text_document") == [*TEXTS[:7], *TEXTS[8:]]


def test_ids_outside_the_vocabulary_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 50)
    with pytest.raises(DataError, match="outside its vocabulary of 50"):
        run.preprocess(options(tmp_path, "in.jsonl"))


def test_standard_input(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--tokenizer-type ByteTokenizer --workers 1 --output-prefix {tmp_path}/out --input -".split()
    assert main(words) == 1 and "needs --input-format" in capsys.readouterr().err
    words += ["--input-format", "jsonl"]
    assert main([*words, "--resume"]) == 1 and "cannot be used with standard input" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", corpus.open())
    assert main(words) == 0 and "40 documents" in capsys.readouterr().out
    assert decoded(tmp_path / "out_text_document") == TEXTS


def test_errors_of_worker_processes_are_one_paragraph(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--tokenizer-type", "ByteTokenizer", "--input", str(corpus), "--output-prefix", f"{tmp_path}/out"]
    assert main([*words, "--workers", "1", "--languages", "xx"]) == 1
    said = capfd.readouterr().err
    assert said.startswith("error: --languages 'xx' is not known") and "Traceback" not in said
    assert not list(tmp_path.glob("out*"))


def test_ray_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is an extra: pip install 'megatron_samoe[ray]'")
    texts = [f"document {n}" for n in range(500)]
    how = {"workers": 2, "chunk_bytes": 2000}
    by_ray, inline = (preprocessed(tmp_path, name, texts, executor=name, **how) for name in ("ray", "inline"))
    assert content(by_ray) == content(inline)
    with pytest.raises(DataError, match="cannot be read"):
        preprocessed(
            tmp_path, "x", texts, executor="ray", tokenizer_type="SentencePieceTokenizer", tokenizer_model="none"
        )
