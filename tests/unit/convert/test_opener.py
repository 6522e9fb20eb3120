"""Every command opens every kind of folder by one opener, or refuses it in a sentence that has the words of its own arguments."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
import torch

import megatron_samoe
from megatron_samoe.cli.program import read
from megatron_samoe.cli.serve import Serve
from megatron_samoe.convert import formats
from megatron_samoe.convert.formats import Format
from megatron_samoe.convert.hf.folder import HFFolder
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.errors import CheckpointError, ConfigError
from megatron_samoe.parallel_state.state import single_process_state
from tests.harness.megatron_files import write_rank_files
from tests.harness.program import call, write_corpus
from tests.harness.serving import save_tiny

TARGETS = {"Hugging Face": "hf", "torch_dist": "torch_dist"}
KINDS = ("run", "checkpoint", *TARGETS, "per-rank files")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns one model's folder of each kind, and a text."""
    root = tmp_path_factory.mktemp("kinds")
    saved = save_tiny(root / "run" / "checkpoints", "moe", num_layers=4, seq_length=16, moe_router_topk=2)
    found = {"run": root / "run", "checkpoint": next(saved.glob("iter_*")), "text": root / "text"}
    for kind, target in TARGETS.items():
        found[kind] = root / target
        done = call(
            "megatron_samoe.cli.convert", "--load-dir", str(saved), "--save-dir", str(found[kind]), "--to", target
        )
        assert done.returncode == 0, done.stderr
    found["per-rank files"] = write_rank_files(open_folder(saved).tensors, root / "megatron").parent
    write_corpus(root / "text", vocab_size=256)
    (root / "text.txt").write_text("one two three four five six seven eight\n" * 20)
    return found


#: Commands' words, with the folder of a model, one to write, and a text; and what Python does.
COMMANDS = {
    "convert": "--load-dir {folder} --save-dir {out} --to hf",
    "edit": "tie --load-dir {folder} --save-dir {out} --expert-sharing tied",
    "compress": "--load-dir {folder} --save-dir {out} --data-path {text} --budget 0.5 --calibration-tokens 512 "
    "--judge-tokens 128 --num-samples 16",
    "inspect_checkpoint": "list {folder}",
    "generate": "--load {folder} --prompt one --max-new-tokens 2",
    "evaluate": "--load {folder} --corpus {text}.txt",
    "serve": "--load {folder}",
    "load": "path",
}


def opened(command: str, folder: Path, out: Path, text: Path) -> str:
    """Opens a folder by a command; returns what is said of it, or raises its error."""
    if command == "load":
        return megatron_samoe.load(folder).generate("one", 2)
    words = COMMANDS[command].format(folder=folder, out=out, text=text).split()
    if command == "serve":  # which would not end
        server = read(Serve, words)
        assert len(server._names()) == 1
        return server._loaded_engine(single_process_state(), str(folder))[0].summary
    done = call(f"megatron_samoe.cli.{command}", *words)
    assert "Traceback" not in done.stderr
    if done.returncode:
        raise CheckpointError(done.stderr)
    assert command != "compress" or (out / "verdicts.json").is_file()
    return done.stdout


@pytest.mark.parametrize(("command", "kind"), list(product(COMMANDS, KINDS)))
def test_a_command_opens_a_kind_of_folder(command: str, kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    assert opened(command, folders[kind], tmp_path / "out", folders["text"])


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_model_is_refused_in_the_commands_words(
    command: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    (word,) = re.findall(r"--load\S*|^path", COMMANDS[command]) or [""]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    for folder, said in ((tmp_path / "nope", "is not there"), (tmp_path / "other", "holds notes.txt")):
        with pytest.raises(CheckpointError) as error:
            opened(command, folder, tmp_path / "out", folders["text"])
        message = str(error.value).removeprefix("error: ").strip()
        assert message.startswith(f"{word} {folder} {said}".strip()) and "torch_dist" in message, message
        assert "\n" not in message and ("--" in message) == word.startswith("--")


def test_all_kinds_hold_the_same_model(folders: dict[str, Path]) -> None:
    expected = megatron_samoe.load(folders["run"])
    ids = expected.tokenizer.encode("one two three")
    for kind in KINDS[1:]:
        found = megatron_samoe.load(folders[kind])
        assert found.tokenizer.encode("one two three") == ids
        torch.testing.assert_close(found.logits(ids), expected.logits(ids), rtol=1e-6, atol=1e-6)


def test_python_asks_for_a_precision_and_an_iteration(folders: dict[str, Path]) -> None:
    for kind in ("run", "Hugging Face"):
        model = megatron_samoe.load(folders[kind], dtype=torch.bfloat16)
        assert model.loaded.model.dtype == torch.bfloat16 and model.generate("one", 2)
    with pytest.raises(CheckpointError, match=r"^step 7: "):
        megatron_samoe.load(folders["run"], 7)
    with pytest.raises(ConfigError, match=r"^step = 7: a Hugging Face folder"):
        megatron_samoe.load(folders["Hugging Face"], 7)


def test_a_format_from_outside_is_opened_by_all(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that only names another, as a program of one's own may have it."""
    own = Format(
        "pointer",
        "a folder that names another",
        lambda path: (path / "pointer.txt").is_file(),
        lambda path, *_: Path((path / "pointer.txt").read_text()),
        lambda directory, _: (open_folder(directory).tensors, ("By way of a pointer.",)),
        lambda directory: ("nothing", []),
        stored=HFFolder,
    )
    monkeypatch.setattr(formats, "added", lambda group: iter([("a place", "a.value", own)]))
    formats.formats.cache_clear()
    try:
        (tmp_path / "pointer.txt").write_text(str(folders["Hugging Face"]))
        found = open_folder(tmp_path)
        assert found.kind == "pointer" and found.notes == ("By way of a pointer.",)
        assert "pointer" in opened("inspect_checkpoint", tmp_path, tmp_path, tmp_path)
        assert opened("generate", tmp_path, tmp_path, tmp_path)
    finally:
        formats.formats.cache_clear()
