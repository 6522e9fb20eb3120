"""The folder of checkpoints: what counts as whole, which is taken, what is kept, and what is said of damage."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from megatron_samoe.config import CheckpointConfig
from megatron_samoe.dist_checkpointing import loading, saving, store
from megatron_samoe.dist_checkpointing.sharded_state import ShardedTensor, replicated, stored_names
from megatron_samoe.errors import CheckpointError
from megatron_samoe.log import logger
from megatron_samoe.parallel_state import single_process_state
from tests.harness.program import flip_bit

STATE = single_process_state()


def tensors(value: float = 1.0) -> dict[str, list[ShardedTensor]]:
    made: dict[str, Tensor] = {
        "a": torch.full((3, 4), value),
        "b": torch.full((5,), value, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(value, dtype=torch.float64),
    }
    return {name: replicated(t, STATE) for name, t in made.items()}


def config(root: Path, **options: Any) -> CheckpointConfig:
    return CheckpointConfig(save=str(root), load=str(root), **options)


def save(root: Path, iteration: int, **options: Any) -> Path:
    return saving.save_checkpoint(
        config(root, **options),
        iteration,
        tensors(float(iteration)),
        {"model": {"x": 1}},
        {"iteration": iteration},
        STATE,
    )


def loaded(directory: Path) -> dict[str, Tensor]:
    state = tensors(-1.0)
    loading.load_checkpoint(directory, state, STATE)
    return {name: part.local for name, (part,) in state.items()}


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path / "new" / "folder", 7)
    assert path.name == "iter_0000007"
    for name, t in loaded(path).items():
        assert torch.equal(t, tensors(7.0)[name][0].local), name
    assert store.read_config(path) == {"model": {"x": 1}}
    saved = store.read_train_state(path)
    assert sorted(saved.pop("digests")) == sorted(p.name for p in path.iterdir() if p.name != store.TRAIN_STATE)
    assert saved == {"format_version": store.FORMAT_VERSION, "iteration": 7}
    assert stored_names(str(path)) == set(tensors())
    assert (path.parent / store.LATEST).read_text() == "7", "as Megatron writes it"
    assert sorted(p.name for p in path.parent.iterdir()) == ["iter_0000007", store.LATEST]


def test_the_newest_is_loaded_and_any_can_be_asked_for(tmp_path: Path) -> None:
    assert store.find_checkpoint(CheckpointConfig()) is None
    assert store.find_checkpoint(config(tmp_path)) is None
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        store.find_checkpoint(config(tmp_path / "absent", exit_on_missing_checkpoint=True))
    for iteration in (5, 10, 12345678):
        save(tmp_path, iteration)
    assert store.whole_iterations(tmp_path) == [5, 10, 12345678]
    assert store.find_checkpoint(config(tmp_path)) == tmp_path / "iter_12345678"
    assert store.find_checkpoint(config(tmp_path, ckpt_step=5)) == tmp_path / "iter_0000005"
    with pytest.raises(CheckpointError, match=r"--ckpt-step 6.*\[5, 10, 12345678\]"):
        store.find_checkpoint(config(tmp_path, ckpt_step=6))


def test_a_pretrained_checkpoint_is_for_a_run_that_has_none_of_its_own(tmp_path: Path) -> None:
    pretrained, own = tmp_path / "pretrained", tmp_path / "run" / "checkpoints"
    save(pretrained, 100)
    options = {"pretrained_checkpoint": str(pretrained), "ckpt_step": 5}
    begun = store.with_start(config(own, **options))
    assert (begun.load, begun.finetune, begun.ckpt_step) == (str(pretrained), True, None)
    final = save(own, 5)
    assert store.with_start(config(own, **options)) == config(own, **options)
    # Killed while the checkpoint was replaced by a newer save of its iteration.
    final.rename(final.with_name(f".{final.name}.replaced"))
    assert store.with_start(config(own, **options)) == config(own, **options) and final.is_dir()
    # The run's folder or one checkpoint's, as --load, must not begin the run again over its checkpoints.
    for meant in (own.parent, final):
        assert store.with_start(config(meant, **options)) == config(meant, **options)
        assert store.find_checkpoint(config(meant)) == final


@pytest.fixture(name="messages")
def recorded_messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(logger, "warning", said.append)
    return said


@pytest.mark.parametrize(("content", "found"), [(None, 10), ("", 10), ("soon", 10), ("77", 10), ("5", 5)])
def test_latest_file_is_followed_unless_it_is_missing_or_wrong(
    content: str | None, found: int, tmp_path: Path, messages: list[str]
) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)
    latest = tmp_path / store.LATEST
    latest.unlink() if content is None else latest.write_text(content)
    assert store.find_checkpoint(config(tmp_path)) == store.iteration_dir(tmp_path, found)
    assert bool(messages) == (content == "77") and all("names iteration 77" in line for line in messages)


@pytest.mark.parametrize(
    "failing", ["write_sharded", "_write_durably", "fsync_dir"], ids=["tensors", "description", "flush"]
)
def test_failed_save_is_never_taken_for_a_checkpoint(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, failing, fail)
        with pytest.raises(CheckpointError, match=r"No space left on device.*Earlier checkpoints are as they were"):
            save(tmp_path, 10)
    found = store.find_checkpoint(config(tmp_path))
    assert found is not None and found.name == "iter_0000005"
    assert store.whole_iterations(tmp_path) == [5]
    assert torch.equal(loaded(found)["a"], torch.full((3, 4), 5.0))
    save(tmp_path, 10)
    assert store.whole_iterations(tmp_path) == [5, 10]
    assert not list(tmp_path.glob(".*")), "the unfinished folder was used anew"


def test_what_a_killed_run_left_is_not_loaded_and_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    shutil.copytree(path, tmp_path / ".iter_0000010.unfinished")
    (tmp_path / ".probe_123.tmp").write_text("probe")
    assert store.whole_iterations(tmp_path) == [5]
    save(tmp_path, 10)
    assert torch.equal(loaded(store.iteration_dir(tmp_path, 10))["a"], torch.full((3, 4), 10.0))
    assert not list(tmp_path.glob(".*"))


def test_saving_an_iteration_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    saving.save_checkpoint(config(tmp_path), 5, tensors(99.0), {}, {}, STATE)
    assert torch.equal(loaded(store.iteration_dir(tmp_path, 5))["a"], torch.full((3, 4), 99.0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000005", store.LATEST]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot create .*file/sub"):
        save(tmp_path / "file" / "sub", 5)


@pytest.mark.parametrize(
    ("keep", "interval"), [(None, None), (1, None), (2, None), (5, None), (9, None), (None, 3), (2, 3), (2, 2)]
)
def test_retention_at_every_step(keep: int | None, interval: int | None, tmp_path: Path) -> None:
    for iteration in range(1, 12):
        save(tmp_path, iteration, keep_last=keep, save_retain_interval=interval)
        newest = iteration if keep is None and interval is None else keep or 1
        kept = [i for i in range(1, iteration + 1) if i > iteration - newest or (interval and i % interval == 0)]
        assert store.whole_iterations(tmp_path) == kept
    assert not list(tmp_path.glob(".*"))


def test_retention_leaves_foreign_and_newer_things_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 9)
    (tmp_path / "iter_notes").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, 5, keep_last=1)
    assert store.whole_iterations(tmp_path) == [5, 9]
    assert (tmp_path / "iter_notes").is_dir() and (tmp_path / "notes.txt").exists()


def test_foreign_folder_is_refused_rather_than_overwritten(tmp_path: Path) -> None:
    (tmp_path / "iter_0000100" / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"no checkpoint of this program, but iter_0000100"):
        store.find_checkpoint(config(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file; it must be a folder"):
        store.find_checkpoint(config(tmp_path / "file"))


def test_a_folder_above_runs_names_them(tmp_path: Path) -> None:
    first, second, copied = (tmp_path / name for name in ("runs/first", "runs/second", "copied/kept"))
    for folder in (first / "checkpoints", second / "checkpoints", copied):
        save(folder, 5)
    (tmp_path / "runs/notes").mkdir()
    for folder, named in (
        (tmp_path / "runs", f"{first}, {second}"),
        (tmp_path, f"{copied}, {first}, {second}"),
        (tmp_path / "copied", copied),
    ):
        said = f"--load {folder} is a folder above runs and has no checkpoint itself: give one of {named}."
        with pytest.raises(CheckpointError, match=f"^{re.escape(said)}$"):
            store.find_checkpoint(config(folder))
    assert store.find_checkpoint(config(first)) == first / "checkpoints/iter_0000005"
    with pytest.raises(CheckpointError, match=r"--pretrained-checkpoint \S+ is a folder above runs"):
        store.refuse_without_checkpoint(str(tmp_path / "runs"), "--pretrained-checkpoint")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"new.weight": (2,)}, r"has no tensor new\.weight"),
        ({"a": (4, 4)}, r"a is \[3, 4\] in the checkpoint and \[4, 4\] in the model"),
        ({f"x{i}": (1,) for i in range(9)}, "x0, x1, x2 and 6 more"),
    ],
)
def test_missing_and_misshapen_tensors_are_named(shapes: dict[str, Any], message: str, tmp_path: Path) -> None:
    state = tensors() | {name: replicated(torch.zeros(shape), STATE) for name, shape in shapes.items()}
    with pytest.raises(CheckpointError, match=message):
        loading.load_checkpoint(save(tmp_path, 5), state, STATE)


def whole(directory: Path) -> list[str]:
    return store.damaged_files(directory, STATE)


def damage(path: Path, how: str) -> None:
    if how == "gone":
        path.unlink()
    elif how == "one bit":
        flip_bit(path)
    else:
        os.truncate(path, path.stat().st_size // 2 if how == "half" else 0)


@pytest.mark.parametrize("how", ["half", "empty", "gone", "one bit"])
@pytest.mark.parametrize("file", ["*.distcp", ".metadata", store.CONFIG, store.TRAIN_STATE])
def test_a_damaged_checkpoint_is_passed_over_and_said_so(
    file: str, how: str, tmp_path: Path, messages: list[str]
) -> None:
    save(tmp_path, 3)
    save(tmp_path, 5)
    path = save(tmp_path, 9)
    (victim,) = path.glob(file)
    damage(victim, how)
    found = store.find_checkpoint(config(tmp_path), whole)
    assert found == store.iteration_dir(tmp_path, 5)
    if not (file == store.TRAIN_STATE and how == "gone"):  # then it is as a save that was cut off
        assert any("iter_0000009 is damaged: " in m and "passed over; loading iteration 5" in m for m in messages)
        with pytest.raises(CheckpointError, match=r"iter_0000009 is damaged: .+ Choose another with --ckpt-step\."):
            store.find_checkpoint(config(tmp_path, ckpt_step=9), whole)


def test_what_is_wrong_with_a_folder_is_said_once_however_often_it_is_looked_at(
    tmp_path: Path, messages: list[str]
) -> None:
    """A start looks for its checkpoint three times: for the step, for the tokenizer, and to load it."""
    save(tmp_path, 5)
    damage(save(tmp_path, 9) / store.TRAIN_STATE, "half")
    (tmp_path / store.LATEST).write_text("11")
    for problems_of in (lambda _: [], lambda _: [], whole):
        assert store.find_checkpoint(config(tmp_path), problems_of) == store.iteration_dir(tmp_path, 5)
    assert sorted(re.findall("is damaged|names iteration 11", "".join(messages))) == [
        "is damaged",
        "names iteration 11",
    ]


def test_what_is_left_is_what_the_folder_has(tmp_path: Path) -> None:
    root = tmp_path / "run"
    assert store.newest_in_words(None).startswith("Nothing was saved")
    assert store.newest_in_words(root) == f"{root} has no complete checkpoint."
    (root / ".iter_0000004.unfinished").mkdir(parents=True)
    (root / "iter_0000004").mkdir()
    assert store.newest_in_words(root) == f"{root} has no complete checkpoint."
    for iteration in (2, 3):
        save(root, iteration)
    assert store.newest_in_words(root) == f"The newest complete checkpoint is {root / 'iter_0000003'}."
    (tmp_path / "file").touch()
    assert "cannot be seen: Not a directory" in store.newest_in_words(tmp_path / "file")


def test_room_is_looked_for_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5)
    usage = shutil.disk_usage(tmp_path)
    needed = saving.bytes_to_write(tensors())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(CheckpointError, match=r"takes 16\.4 kB, .* has 16\.4 kB left"):
        save(tmp_path, 9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000005", store.LATEST]


def test_only_owners_write(tmp_path: Path) -> None:
    state = {name: [replace(t, is_owner=name == "a")] for name, (t,) in tensors().items()}
    path = saving.save_checkpoint(config(tmp_path), 1, state, {}, {}, STATE)
    assert stored_names(str(path)) == {"a"}
    assert yaml.safe_load((path / store.CONFIG).read_text()) == {}
