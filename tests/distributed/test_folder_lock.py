"""Two runs never write to one folder; a lock does not outlive the run that held it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path

import pytest

from megatron_samoe.dist_checkpointing import folder_lock
from megatron_samoe.errors import CheckpointError
from tests.harness.pairs import first_by_day
from tests.harness.program import arguments, start

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("num_ranks", first_by_day([2, 1]))
def test_a_second_run_is_told_who_holds_the_folder(num_ranks: int, corpus: Path, tmp_path: Path) -> None:
    args = arguments(data_path=corpus, run_dir=tmp_path / "run", train_iters=100_000, eval_iters=0)
    holder = start(args, tmp_path / "holder")
    holder.wait_for_step(3)
    message = start(args, tmp_path / "second", num_ranks=num_ranks).fail()
    assert f"{tmp_path / 'run/checkpoints'} is in use by another run (process {holder.processes[0].pid} on " in message
    assert "since 20" in message and "--save or --run-dir" in message
    holder.signal(signal.SIGTERM)
    holder.succeed()
    assert not (tmp_path / "run/checkpoints/.lock").exists()


def test_a_lock_that_was_removed_while_it_was_waited_for_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, flock = [], fcntl.flock

    def remove_once(handle: int, how: int) -> None:
        flock(handle, how)
        if not taken:
            os.unlink(tmp_path / ".lock")  # what the holder before does as it leaves
        taken.append(handle)

    monkeypatch.setattr(folder_lock.fcntl, "flock", remove_once)
    with folder_lock.folder_lock(tmp_path):
        assert len(taken) == 2
        with pytest.raises(CheckpointError, match=f"process {os.getpid()} on "), folder_lock.folder_lock(tmp_path):
            pass


def test_a_file_system_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder_lock.fcntl, "flock", refuse)
    monkeypatch.setattr(folder_lock.logger, "propagate", True)
    with caplog.at_level("INFO", logger="megatron_samoe"), folder_lock.folder_lock(tmp_path):
        pass
    assert "without locks" in caplog.text
