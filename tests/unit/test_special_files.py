"""Pipes, devices and files of holes in place of a file that users name or a folder holds: one sentence, at once."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_samoe.cli.generate import EngineOptions, Generate, ModelOptions
from megatron_samoe.config.cli import read_yaml
from megatron_samoe.convert.hf.folder import read_json
from megatron_samoe.convert.megatron.rank_files import find_iteration
from megatron_samoe.datasets import manifest
from megatron_samoe.datasets.blends import read_blend_yaml
from megatron_samoe.datasets.preprocess.inputs import find_inputs
from megatron_samoe.datasets.preprocess.options import PreprocessOptions
from megatron_samoe.datasets.tokenizer import build_tokenizer
from megatron_samoe.dist_checkpointing.store import read_train_state
from megatron_samoe.dist_checkpointing.table_of_contents import read_table
from megatron_samoe.errors import MegatronSamoeError
from megatron_samoe.evaluation.zero_shot.data_files import read_text
from megatron_samoe.evaluation.zero_shot.tasks import read_task_file
from megatron_samoe.inference.server.run import read_api_key

#: Readers of a file, and its name.
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "configuration": ("config.yaml", read_yaml),
    "task": ("task.yaml", read_task_file),
    "blend": ("blend.yaml", lambda path: read_blend_yaml(str(path))),
    "manifest": ("x.manifest.json", lambda path: manifest.read(str(path).removesuffix(".manifest.json"))),
    "prompts": (
        "prompts.txt",
        lambda path: Generate(
            model=ModelOptions(load="x"), engine=EngineOptions(), prompts_file=str(path)
        )._given_prompts(),
    ),
    "key": ("key", read_api_key),
    "corpus of an evaluation": ("text.txt", read_text),
    "input": ("input.jsonl", lambda path: find_inputs(PreprocessOptions(input=(str(path),), output_prefix="x"))),
    "SentencePiece": ("t.model", lambda path: build_tokenizer("SentencePieceTokenizer", str(path))),
    "tokenizers": ("tokenizer.json", lambda path: build_tokenizer("HuggingFaceTokenizer", str(path))),
    "vocabulary": ("vocab.json", lambda path: build_tokenizer("GPT2BPETokenizer", None, str(path), str(path))),
    "Hugging Face": ("config.json", read_json),
    "Megatron": ("latest_checkpointed_iteration.txt", lambda path: find_iteration(path.parent)),
    "training state": ("train_state.json", lambda path: read_train_state(path.parent)),
    "table of contents": (".metadata", lambda path: read_table(path.parent)),
}


def place(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with open(path, "wb") as file:
            file.truncate(1 << 42)


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """A reader that waits is ended."""
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


#: Of any length: they are read by pieces, or as far as memory goes.
LONG = {"corpus of an evaluation", "prompts", "input"}


CASES = [
    (reader, kind)
    for reader in READERS
    for kind in ("pipe", "device", "holes")
    if kind != "holes" or reader not in LONG
]


@pytest.mark.parametrize(("reader", "kind"), CASES)
def test_it_is_refused_by_name(reader: str, kind: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    place(tmp_path / name, kind)
    with pytest.raises(MegatronSamoeError) as caught:
        read(tmp_path / name)
    message = str(caught.value)
    assert name in message and "\n" not in message and len(message) < 500
    reason = "has at most" if kind == "holes" else "a pipe or a device"
    assert reason in message or "not there" in message, message


def test_a_pipe_with_a_writer_is_not_waited_for_either(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    end = os.open(tmp_path / "config.yaml", os.O_RDWR)
    with pytest.raises(MegatronSamoeError, match="a pipe or a device"):
        read_yaml(tmp_path / "config.yaml")
    os.close(end)
    assert stat.S_ISFIFO((tmp_path / "config.yaml").stat().st_mode)


def test_files_are_read_as_before(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes("a: ä\r\nb: 2\r\n".encode())
    assert read_yaml(tmp_path / "config.yaml") == {"a": "ä", "b": 2}
    (tmp_path / "link.json").symlink_to(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    assert read_json(tmp_path / "link.json") == {"a": 1}
