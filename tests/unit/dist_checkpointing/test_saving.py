"""Saving: in the background, by several ranks of which one fails, and onto disks that refuse."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_samoe.config import CheckpointConfig, PretrainConfig
from megatron_samoe.dist_checkpointing import digests, file_storage, loading, saving, store
from megatron_samoe.dist_checkpointing.saving import BackgroundSaver
from megatron_samoe.dist_checkpointing.sharded_state import ShardedTensor, replicated
from megatron_samoe.errors import CheckpointError
from megatron_samoe.parallel_state import initialize_model_parallel, single_process_state
from tests.harness.ranks import run_ranks
from tests.harness.tables import table
from tests.harness.tiny import tiny_config, with_layout

TABLE = table(__file__)

STATE = single_process_state()


def test_what_is_saved_is_the_state_at_the_start_and_training_need_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, go_on, done = CheckpointConfig(save=str(tmp_path)), threading.Event(), []
    real = saving.write_sharded

    def slow(*args: Any) -> dict[str, str]:
        assert go_on.wait(30)
        return real(*args)

    monkeypatch.setattr(saving, "write_sharded", slow)
    saver, weight = BackgroundSaver(STATE, timedelta(minutes=1)), torch.ones(4)
    saver.start(config, 5, {"w": replicated(weight, STATE)}, {}, {}, done.append)
    weight.fill_(2.0)
    assert store.whole_iterations(tmp_path) == [], "the disk has not finished, and we are here"
    saver.wait(timeout_s=0.01)
    assert done == []
    go_on.set()
    saver.start(config, 6, {"w": replicated(weight, STATE)}, {}, {}, done.append)
    weight.fill_(3.0)
    saver.wait()
    assert done == [store.iteration_dir(tmp_path, 5), store.iteration_dir(tmp_path, 6)]
    for iteration, value in ((5, 1.0), (6, 2.0)):
        read = torch.zeros(4)
        loading.load_checkpoint(store.iteration_dir(tmp_path, iteration), {"w": replicated(read, STATE)}, STATE)
        assert torch.equal(read, torch.full((4,), value))


def test_failure_is_raised_at_the_next_wait_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    saver = BackgroundSaver(STATE, timedelta(minutes=1))
    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_sharded", fail)
        saver.start(CheckpointConfig(save=str(tmp_path)), 5, {"w": replicated(torch.ones(4), STATE)}, {}, {})
        with pytest.raises(CheckpointError, match="No space left on device"):
            saver.wait()
    saver.wait()
    saver.start(CheckpointConfig(save=str(tmp_path)), 6, {"w": replicated(torch.ones(4), STATE)}, {}, {})
    saver.wait()
    assert store.whole_iterations(tmp_path) == [6]


def save_in_parts(folder: str) -> None:
    parallel = initialize_model_parallel(with_layout(tiny_config(), ep=2).parallel)
    saver, rank = BackgroundSaver(parallel, timedelta(minutes=1)), parallel.rank
    part = ShardedTensor(torch.full((2, 3), float(rank)), (4, 3), (2 * rank, 0), True)
    shared = replicated(torch.ones(2), parallel)
    for iteration in (1, 2):
        saver.start(CheckpointConfig(save=folder), iteration, {"x": [part], "y": shared}, {}, {})
        for _ in range(50):  # collectives of training go on between the ranks meanwhile
            total = parallel.world.all_reduce(torch.ones(1))
            assert total.item() == 2
        part.local.add_(10)
    saver.wait()


@pytest.mark.distributed
def test_ranks_save_their_parts_while_they_train(tmp_path: Path) -> None:
    run_ranks(partial(save_in_parts, str(tmp_path)), 2)
    whole = {"x": replicated(torch.zeros(4, 3), STATE), "y": replicated(torch.zeros(2), STATE)}
    loading.load_checkpoint(store.iteration_dir(tmp_path, 2), whole, STATE)
    assert whole["x"][0].local[:, 0].tolist() == [10.0, 10.0, 11.0, 11.0]
    assert store.damaged_files(store.iteration_dir(tmp_path, 2), STATE) == []


def fail_on_rank_1(place: str, folder: str) -> str:
    parallel = initialize_model_parallel(PretrainConfig().parallel)
    config, rank = CheckpointConfig(save=folder, load=folder), parallel.rank
    state = {"x": [ShardedTensor(torch.ones(2, 3), (4, 3), (2 * rank, 0), True)]}
    if place == "save" and rank == 1:
        write = saving.write_sharded

        def fail(*args: Any) -> None:
            write(*args)
            raise OSError(errno.ENOSPC, "No space left on device")

        saving.write_sharded = fail
    with pytest.raises(CheckpointError) as caught:
        saved = saving.save_checkpoint(config, 1, state, {}, {}, parallel)
        if place == "verify":
            if rank == 0:
                next(saved.glob("__1_*.distcp")).write_bytes(b"")
            parallel.world.barrier()
        loading.load_checkpoint(saved / "nothing" if (place, rank) == ("load", 1) else saved, state, parallel)
    assert caught.value.collective
    return str(caught.value)


@pytest.mark.distributed
@pytest.mark.parametrize(("place", "said"), TABLE["troubles"])
def test_trouble_of_one_rank_stops_all_with_the_same_words(place: str, said: str, tmp_path: Path) -> None:
    first, second = run_ranks(partial(fail_on_rank_1, place, str(tmp_path)), 2)
    assert first == second and said in first
    assert store.whole_iterations(tmp_path) == ([] if place == "save" else [1])


@pytest.mark.parametrize("refused", [False, True], ids=["direct", "refused"])
def test_a_file_of_any_size_has_its_bytes_and_their_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """Blocks are written past the page cache, an odd end through it; so is all where the file system refuses."""
    monkeypatch.setattr(file_storage, "WRITTEN_BYTES", 8192)
    write = os.write

    def refuse(fd: int, data: memoryview) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "refused")
        return write(fd, data[:4096])

    if refused:
        monkeypatch.setattr(os, "write", refuse)
    for size in (0, 1, 4096, 8191, 8192, 8193, 3 * 8192, 5 * 8192 + 4097):
        content = os.urandom(size)
        files = file_storage._DigestingFileSystem()
        with files.create_stream(tmp_path / "x", "wb") as stream:
            way = fcntl.fcntl(stream._fd, fcntl.F_GETFL)
            for at in range(0, size, 3001):
                stream.write(content[at : at + 3001])
                stream.flush()
            assert stream.tell() == size
            # A flush after each tensor ends no direct writing.
            assert refused or fcntl.fcntl(stream._fd, fcntl.F_GETFL) == way
            os.fsync(stream.fileno())
            assert (tmp_path / "x").read_bytes() == content and not stream.closed
        # Python 3.13 complains of a stream whose end would flush a file that is closed.
        assert stream.closed
        assert files.digests["x"] == digests.digest_of(tmp_path / "x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
def test_a_full_disk_is_an_error() -> None:
    files = file_storage._DigestingFileSystem()
    with pytest.raises(OSError, match="No space left"), files.create_stream("/dev/full", "wb") as stream:
        stream.write(b"abc")
    assert not files.digests
