"""Every message of docs/troubleshooting.md is what the program says where its cause is there."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_samoe.cli.command import module_of
from megatron_samoe.dist_checkpointing.folder_lock import folder_lock
from megatron_samoe.errors import MegatronSamoeError, optional_import
from tests.harness.program import REPOSITORY, arguments, call, start, write_corpus

pytestmark = pytest.mark.distributed
PREPROCESS = ("--output-prefix", "x", "--tokenizer-type", "ByteTokenizer")
LARGE = "--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --vocab-size 50257".split()
MESSAGES = re.findall(r"^\| `(.+?)` \|", (REPOSITORY / "docs/troubleshooting.md").read_text(), re.MULTILINE)


def said(command: str, *words: object) -> str:
    """Returns what a command that fails says."""
    done = call(module_of(command), *map(str, words))
    assert done.returncode != 0
    return done.stderr


def refused(*words: str) -> str:
    """Returns what training says of options."""
    return said("pretrain", *arguments(mock_data=True), *words)


def failed(**options: object) -> str:
    """Returns what a run on the project's corpus ends with."""
    given = {"data_path": "data/corpus", "run_dir": "other", "train_iters": 9, **options}
    return start(arguments(**given), Path("out"), cwd=Path.cwd()).fail()


def raised(cause: Callable[[], object]) -> str:
    with pytest.raises(MegatronSamoeError) as caught:
        cause()
    return str(caught.value)


def wrong_key() -> str:
    Path("config.yaml").write_text("model:\n  num_layer: 4\n")
    return said("pretrain", "--config", "config.yaml")


def rows_without_text() -> str:
    Path("rows.jsonl").write_text('{"body": "x"}\n')
    return said("preprocess", "--input", "rows.jsonl", *PREPROCESS, "--workers", 1, "--executor", "inline")


def tokenizer_again() -> str:
    Path("text.txt").write_text("It was a text. " * 20)
    Path("data/tokenizer.json").touch()
    words = "--type byte-bpe --input text.txt --vocab-size 300 --output-prefix data/tokenizer"
    return said("train-tokenizer", *words.split())


def foreign_tokens() -> str:
    return failed(data_path=write_corpus(Path("data/wide"), vocab_size=5000))


def short_text() -> str:
    return failed(data_path=write_corpus(Path("data/short"), num_documents=3, document_tokens=5))


def two_runs() -> None:
    with folder_lock("."), folder_lock("."):
        pass


def damaged() -> str:
    (weights,) = Path("run/checkpoints").glob("*/__0_0.distcp")
    content = bytearray(weights.read_bytes())
    weights.write_bytes(bytes([*content[:-1], content[-1] ^ 1]))
    try:
        return failed(run_dir="run")
    finally:
        weights.write_bytes(content)


def port_in_use() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        return said("serve", "--load", "run", "--port", taken.getsockname()[1])


CAUSES: dict[str, Callable[[], str]] = {
    "--num-expert-bank is": lambda: refused("--num-expert-bank", "2"),
    "--recompute-activations is": lambda: refused("--recompute-activations"),
    "--num-expert-banks =": lambda: refused("--expert-layout", "moe"),
    "model.num_layer": wrong_key,
    "--num-attention-heads": lambda: refused("--num-attention-heads", "3"),
    "--tensor-model-parallel-size": lambda: refused("--tensor-model-parallel-size", "3"),
    "--global-batch-size": lambda: refused("--micro-batch-size", "3"),
    "--distributed-backend": lambda: refused("--distributed-backend", "nccl"),
    "--memory-gb": lambda: said("plan", "--world-size", 1, "--memory-gb", 1, "--mock-data", *LARGE),
    "--input": lambda: said("preprocess", "--input", "none.jsonl", *PREPROCESS),
    "rows.jsonl": rows_without_text,
    "... exists. Give": tokenizer_again,
    "There is no dataset": lambda: said("pretrain", *arguments(data_path="data/corpsu")),
    "... holds token id": foreign_tokens,
    "The train split": short_text,
    "The valid split": lambda: failed(split="100,0,0"),
    "The checkpoint in": lambda: failed(run_dir="run", hidden_size=32),
    "... is in use": lambda: raised(two_runs),
    "Iteration": lambda: failed(lr=1e30),
    "... is damaged": damaged,
    "--load": lambda: said("generate", "--load", "runs/none", "--prompt", "x"),
    "... has no validation loss": lambda: said("report", "--output", "report.html", "run"),
    "--host and --port": port_in_use,
    "Task piqa": lambda: said("evaluate", "--load", "run", "--data-dir", "data", "--tasks", "piqa"),
    "--save-dir": lambda: said("convert", "--load-dir", "run/checkpoints", "--save-dir", "run", "--to", "hf"),
    "... needs the package": lambda: raised(lambda: optional_import("not_installed", "hf", "Converting")),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and a run of two steps that was stopped before its first evaluation."""
    folder = tmp_path_factory.mktemp("project")
    write_corpus(folder / "data/corpus")
    start(arguments(data_path="data/corpus", run_dir="run", exit_interval=2), folder / "out", cwd=folder).succeed()
    return folder


@pytest.mark.parametrize("message", MESSAGES)
def test_the_cause_gives_the_message(message: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    (cause,) = [cause for begin, cause in CAUSES.items() if message.startswith(begin)]
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    found = " ".join(cause().split())
    assert re.search(pattern, found), found


def test_every_cause_is_on_the_page() -> None:
    assert len(MESSAGES) == len(CAUSES) >= 20
