"""Room for checkpoints is looked for before steps are taken that could not be saved."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from megatron_samoe.config import CheckpointConfig
from megatron_samoe.dist_checkpointing.saving import bytes_to_write
from megatron_samoe.dist_checkpointing.store import iteration_dir, whole_iterations
from megatron_samoe.errors import CheckpointError
from megatron_samoe.training.checkpointing import run_state
from megatron_samoe.training.save_folder import most_checkpoints
from megatron_samoe.training.trainer import Trainer
from tests.harness.tables import table
from tests.harness.tiny import RandomBatches, started, tiny_config

TABLE = table(__file__)


def train(folder: Path, **options: object) -> int:
    """Trains to iteration 6, saving every second, and returns the steps that were taken; CheckpointError as the run has it."""
    options = {"save": str(folder), "load": str(folder), "save_interval": 2, "train_iters": 6, **options}
    setup, _ = started(tiny_config("samoe", eval_iters=0, **options))
    data = RandomBatches(setup)
    try:
        Trainer(setup, data, []).run()  # type: ignore[arg-type]
    except CheckpointError as error:
        error.args = (f"{error} [{data.steps} steps]",)
        raise
    return data.steps


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, int]:
    """The bytes of a checkpoint, and those that are asked for before one is written."""
    folder = tmp_path_factory.mktemp("measured")
    train(folder, train_iters=2)
    return used(folder), bytes_to_write(run_state(*started(tiny_config("samoe"))))


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def limit_disk(monkeypatch: pytest.MonkeyPatch, folder: Path, total: int) -> None:
    """The system says of the disk that it has so many bytes, of which those of a folder are taken."""
    folder.mkdir(parents=True, exist_ok=True)
    real = shutil.disk_usage(folder)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: real._replace(total=total, used=used(folder), free=total - used(folder))
    )


def test_a_run_that_could_not_save_takes_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int]
) -> None:
    limit_disk(monkeypatch, tmp_path, sizes[1] - 1)
    with pytest.raises(CheckpointError) as caught:
        train(tmp_path)
    message = str(caught.value)
    assert message.startswith("cannot begin to train: a checkpoint takes ") and "[0 steps]" in message
    assert f"{tmp_path} has {sizes[1] / 1e6:.3g} MB left; make room" in message and "--keep-last" in message


@pytest.mark.parametrize("async_save", [False, True], ids=["waiting", "background"])
def test_a_run_ends_at_the_last_checkpoint_that_has_room(
    async_save: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sizes: tuple[int, int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    limit_disk(monkeypatch, tmp_path, sizes[1] + 3 * sizes[0] // 2)
    caplog.set_level(logging.INFO, "megatron_samoe")
    with pytest.raises(CheckpointError, match="cannot train on after iteration 4, which is saved") as caught:
        train(tmp_path, async_save=async_save)
    assert f"a checkpoint takes {sizes[1] / 1e6:.3g} MB; {tmp_path} has" in caplog.text
    assert "3 checkpoints, the most that this run will hold, take" in caplog.text
    assert "--keep-last keeps fewer" in caplog.text
    assert whole_iterations(tmp_path) == [2, 4]
    if not async_save:  # else training has gone on while the disk was written
        assert "[4 steps]" in str(caught.value)
    # What it says helps: with fewer kept, the same run ends.
    shutil.rmtree(iteration_dir(tmp_path, 2))
    caplog.clear()
    assert train(tmp_path, keep_last=1) == 2
    assert "the most that this run will hold" not in caplog.text, "the one that is there will be deleted"


def test_a_run_that_is_about_to_leave_needs_no_more_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int]
) -> None:
    limit_disk(monkeypatch, tmp_path, sizes[1] + 4096)  # the lock, too
    assert train(tmp_path, exit_interval=2) == 2
    assert whole_iterations(tmp_path) == [2]


@pytest.mark.parametrize(("options", "iteration", "most"), TABLE["most"])
def test_the_most_checkpoints_that_a_run_holds(options: dict[str, int], iteration: int, most: int) -> None:
    assert most_checkpoints(CheckpointConfig(save="x", **options), iteration, 105) == most  # type: ignore[arg-type]
