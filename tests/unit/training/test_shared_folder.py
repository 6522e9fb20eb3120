"""A host that does not see what the others write to --save."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_samoe.dist_checkpointing.folder_lock import NAME
from megatron_samoe.errors import ConfigError, HostDiffersError, HostRefusedError, MegatronSamoeError
from megatron_samoe.parallel_state import launcher
from megatron_samoe.training.save_folder import _refuse_unshared

USUAL, OTHER = "usual", "other"


def raised(folders: list[str], members: list[int], root: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns what ranks raise, each on a host of its own that has one of two folders at --save."""
    for folder in (USUAL, OTHER):
        (root / folder).mkdir()
    (root / folders[0] / NAME).write_text("rank 0")
    own, values, barrier = threading.local(), [None] * len(folders), threading.Barrier(len(folders), timeout=10)
    monkeypatch.setattr(socket, "gethostname", lambda: f"host{own.rank}")
    monkeypatch.setattr(launcher, "is_member", lambda: own.rank in members)
    found: list[Any] = [None] * len(folders)

    def gather(value: Any) -> list[Any]:
        values[own.rank] = value
        barrier.wait()
        gathered = list(values)
        barrier.wait()
        return gathered

    def one(rank: int) -> None:
        own.rank = rank
        try:
            parallel: Any = SimpleNamespace(world=SimpleNamespace(all_gather_object=gather))
            _refuse_unshared(root / folders[rank], parallel, 0.0, elastic=True)
        except MegatronSamoeError as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(folders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


@pytest.mark.parametrize("spare", [0, 2])
def test_a_spare_without_the_folder_is_refused(spare: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is the first rank, whose files the others do not see."""
    folders = [OTHER if rank == spare else USUAL for rank in range(3)]
    found = raised(folders, [rank for rank in range(3) if rank != spare], tmp_path, monkeypatch)
    for rank, error in enumerate(found):
        assert isinstance(error, HostDiffersError if rank == spare else HostRefusedError)
        assert "must be a folder that all hosts share" in str(error) and f"host{spare}" in str(error)


def test_hosts_that_begin_apart_end_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = raised([USUAL, OTHER], [], tmp_path, monkeypatch)
    assert [type(error) for error in found] == [ConfigError] * 2
