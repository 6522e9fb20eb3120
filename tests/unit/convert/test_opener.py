"""Every command opens every kind of folder by one opener, or refuses it in a sentence that has the words of its own arguments."""

from __future__ import annotations

from collections.abc import Callable
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
from tests.harness.program import call, flags, write_corpus
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
        done = call(f"{CLI}.convert", "--load-dir", str(saved), "--save-dir", str(found[kind]), "--to", target)
        assert done.returncode == 0, done.stderr
    found["per-rank files"] = write_rank_files(open_folder(saved).tensors, root / "megatron").parent
    write_corpus(root / "text", vocab_size=256)
    (root / "text.txt").write_text("one two three four five six seven eight\n" * 20)
    return found


CLI = "megatron_samoe.cli"


def _called(name: str, *words: object) -> str:
    """Runs a command; returns what it printed, or raises its error."""
    done = call(f"{CLI}.{name}", *map(str, words))
    assert "Traceback" not in done.stderr
    if done.returncode:
        raise CheckpointError(done.stderr)
    return done.stdout


def _serve(folder: Path, out: Path, text: Path) -> str:
    command = read(Serve, ["--load", str(folder)])
    assert len(command._names()) == 1
    return command._loaded_engine(single_process_state(), str(folder))[0].summary


def _load(folder: Path, out: Path, text: Path) -> str:
    return megatron_samoe.load(folder).generate("one", 2)


def _compress(folder: Path, out: Path, text: Path) -> str:
    sizes = flags(budget=0.5, calibration_tokens=512, judge_tokens=128, num_samples=16)
    done = _called("compress", *flags(load_dir=folder, save_dir=out, data_path=text), *sizes)
    assert (out / "verdicts.json").is_file()
    return done


def _edit(folder: Path, out: Path, text: Path) -> str:
    return _called("edit", "tie", "--load-dir", folder, "--save-dir", out, "--expert-sharing", "tied")


def _convert(folder: Path, out: Path, text: Path) -> str:
    return _called("convert", "--load-dir", folder, "--save-dir", out, "--to", "hf")


def _generate(folder: Path, out: Path, text: Path) -> str:
    return _called("generate", *flags(load=folder, prompt="one", max_new_tokens=2))


COMMANDS: dict[str, tuple[Callable[[Path, Path, Path], str], str]] = {
    "convert": (_convert, "--load-dir"),
    "edit": (_edit, "--load-dir"),
    "compress": (_compress, "--load-dir"),
    "inspect": (lambda folder, out, text: _called("inspect_checkpoint", "list", folder), ""),
    "generate": (_generate, "--load"),
    "evaluate": (lambda folder, out, text: _called("evaluate", "--load", folder, "--corpus", f"{text}.txt"), "--load"),
    "serve": (_serve, "--load"),
    "load": (_load, "path"),
}


@pytest.mark.parametrize(("command", "kind"), list(product(COMMANDS, KINDS)))
def test_a_command_opens_a_kind_of_folder(command: str, kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    assert COMMANDS[command][0](folders[kind], tmp_path / "out", folders["text"])


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_model_is_refused_in_the_commands_words(
    command: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    run, word = COMMANDS[command]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    for folder, said in ((tmp_path / "nope", "is not there"), (tmp_path / "other", "holds notes.txt")):
        with pytest.raises(CheckpointError) as error:
            run(folder, tmp_path / "out", folders["text"])
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
        opened = open_folder(tmp_path)
        assert opened.kind == "pointer" and opened.notes == ("By way of a pointer.",)
        assert "pointer" in _called("inspect_checkpoint", "list", tmp_path)
        assert _generate(tmp_path, tmp_path, tmp_path)
    finally:
        formats.formats.cache_clear()
