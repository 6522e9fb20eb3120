"""Loading, which verifies in the same pass: what it reads, where that goes, and what ends it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.config import CheckpointConfig, PretrainConfig
from megatron_samoe.dist_checkpointing import digests, loading, saving, store
from megatron_samoe.dist_checkpointing.loading import DamagedFilesError
from megatron_samoe.dist_checkpointing.sharded_state import ShardedTensor, replicated
from megatron_samoe.dist_checkpointing.table_of_contents import read_table
from megatron_samoe.errors import CheckpointError
from megatron_samoe.log import logger
from megatron_samoe.parallel_state import initialize_model_parallel, single_process_state
from tests.harness.program import flip_bit
from tests.harness.ranks import run_ranks

STATE = single_process_state()
ROWS, COLUMNS = 300, 512


def matrix(seed: int) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def saved(root: Path, iteration: int) -> Path:
    """A checkpoint of matrices that are large, a transposed one, and small tensors between them."""
    made = {f"large.{i}": matrix(10 * iteration + i) for i in range(4)}
    made |= {f"small.{i}": torch.full((3,), iteration + i, dtype=torch.bfloat16) for i in range(4)}
    made |= {"scalar": torch.tensor(float(iteration)), "empty": torch.zeros(0, 3), "transposed": matrix(iteration).t()}
    state = {name: replicated(made[name], STATE) for name in sorted(made, key=lambda name: name[::-1])}
    return saving.save_checkpoint(CheckpointConfig(save=str(root)), iteration, state, {}, {}, STATE)


@pytest.fixture(name="small_blocks")
def blocks_smaller_than_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "BLOCK_BYTES", 100_000)
    monkeypatch.setattr(loading, "BLOCK_BYTES", 70_000)
    monkeypatch.setattr(loading, "SMALL_BYTES", 10_000)


def wanted() -> dict[str, list[ShardedTensor]]:
    """Tensors as they are stored, parts of them, several parts of one, and other dtypes and orders in memory."""

    def part(rows: slice, columns: slice = slice(0, COLUMNS), **kind: Any) -> ShardedTensor:
        local = torch.zeros(ROWS, COLUMNS, **kind)[rows, columns].clone()
        return ShardedTensor(local, (ROWS, COLUMNS), (rows.start, columns.start), True)

    every = slice(0, ROWS)
    return {
        "large.0": [part(every)],
        "large.1": [part(slice(100, 300)), part(slice(0, 7), slice(5, 9)), part(every)],
        "large.2": [part(slice(100, ROWS), dtype=torch.float64), part(slice(0, 100), dtype=torch.bfloat16)],
        "transposed": [ShardedTensor(torch.zeros(COLUMNS, ROWS), (COLUMNS, ROWS), (0, 0), True)],
        "large.3": [ShardedTensor(torch.zeros(COLUMNS, ROWS).t(), (ROWS, COLUMNS), (0, 0), True)],
        "small.1": [ShardedTensor(torch.zeros(2, dtype=torch.bfloat16), (3,), (1,), True)],
        "scalar": replicated(torch.tensor(0.0), STATE),
        "empty": replicated(torch.zeros(0, 3), STATE),
    }


def check(state: dict[str, list[ShardedTensor]], iteration: int) -> None:
    full = {f"large.{i}": matrix(10 * iteration + i) for i in range(4)}
    full |= {"small.1": torch.full((3,), iteration + 1.0), "scalar": torch.tensor(float(iteration))}
    full |= {"empty": torch.zeros(0, 3), "transposed": matrix(iteration).t()}
    for name, parts in state.items():
        for part in parts:
            box = tuple(slice(o, o + s) for o, s in zip(part.offsets, part.sizes, strict=True))
            assert torch.equal(part.local, full[name][box].to(part.dtype)), name


def load_newest(root: Path, state: dict[str, list[ShardedTensor]]) -> Path:
    config = CheckpointConfig(load=str(root))

    def load(problems_of: store.Problems) -> Path:
        directory = store.find_checkpoint(config, problems_of)
        assert directory is not None
        loading.load_checkpoint(directory, state, STATE)
        return directory

    return loading.load_newest(load, STATE)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("at_once", [None, 1000], ids=["", "short reads"])
def test_parts_of_any_kind_are_loaded(tmp_path: Path, at_once: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    read, state = os.preadv, wanted()
    path = saved(tmp_path, 3)
    if at_once is not None:
        monkeypatch.setattr(os, "preadv", lambda fd, views, offset: read(fd, [views[0][:at_once]], offset))
    loading.load_checkpoint(path, state, STATE)
    check(state, 3)


def bytes_read() -> int:
    """What this process has asked the system for, as Linux counts it."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


@pytest.mark.parametrize("names", [["large.0", "large.1", "large.2", "large.3"], ["large.1"]], ids=["all", "one"])
def test_a_file_is_read_once(names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "SMALL_BYTES", 100_000)
    path = saved(tmp_path, 3)
    (file,) = path.glob("*.distcp")
    state = {name: replicated(torch.zeros(ROWS, COLUMNS), STATE) for name in names}
    loading.load_checkpoint(path, state, STATE)
    before = bytes_read()
    loading.load_checkpoint(path, state, STATE)
    assert file.stat().st_size < bytes_read() - before < 1.05 * file.stat().st_size
    check(state, 3)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 200_000)


flip = partial(flip_bit, at=-300_000)  # of a large tensor near the end of the file


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "gone": (Path.unlink, "is missing"),
    "empty": (lambda path: os.truncate(path, 0), "differs from what was written"),
    "cut": (cut, "differs from what was written"),
    "one bit": (flip, "differs from what was written"),
    "longer": (lambda path: os.truncate(path, path.stat().st_size + 1), "differs from what was written"),
    "no tensors": (lambda path: path.write_bytes(os.urandom(path.stat().st_size)) and None, "differs from what"),
    "a pipe": (pipe, "is missing"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()) and None, "is missing"),
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("how", DAMAGE)
def test_an_older_checkpoint_is_loaded_where_files_are_damaged(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(logger, "warning", said.append)
    older, newer = saved(tmp_path, 3), saved(tmp_path, 5)
    (file,) = newer.glob("*.distcp")
    damage, problem = DAMAGE[how]
    damage(file)
    state = wanted()
    assert load_newest(tmp_path, state) == older
    check(state, 3)
    (line,) = said
    assert f"{newer} is damaged: {file.name} {problem}" in line and "passed over; loading iteration 3" in line
    with pytest.raises(DamagedFilesError, match=f"iter_0000005 is damaged: {file.name} {problem}") as caught:
        loading.load_checkpoint(newer, wanted(), STATE)
    assert caught.value.collective
    (file,) = older.glob("*.distcp")
    damage(file)
    with pytest.raises(CheckpointError, match=r"iter_0000005 is damaged.*iter_0000003 is damaged.* from a copy"):
        load_newest(tmp_path, wanted())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("change", "problem"), [(cut, "differs from"), (flip, "differs from"), (None, "Input/output")])
def test_a_file_that_changes_or_fails_while_it_is_read(
    change: Callable[[Path], None] | None, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change comes after the first half was read, and when what describes the tensors has been."""
    saved(tmp_path, 3)
    (file,) = saved(tmp_path, 5).glob("*.distcp")
    read, left, half = os.preadv, [1], file.stat().st_size // 2

    def failing(fd: int, views: list[memoryview], offset: int) -> int:
        if offset > half and os.path.sameopenfile(fd, opened) and left:
            if change is None:
                raise OSError(errno.EIO, "Input/output error")
            left.pop()
            change(file)
        return read(fd, views, offset)

    opened, state = os.open(file, os.O_RDONLY), wanted()
    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(DamagedFilesError, match=problem):
        loading.load_checkpoint(file.parent, state, STATE)
    assert load_newest(tmp_path, state).name == "iter_0000003"
    os.close(opened)
    check(state, 3)


def test_a_host_out_of_files_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older checkpoint would be loaded, and the newer ones be replaced."""
    saved(tmp_path, 3)
    (file,) = saved(tmp_path, 5).glob("*.distcp")
    digest_of = loading.digest_of

    def full(path: Path, *others: Any) -> str:
        if path == file:
            raise OSError(errno.EMFILE, "Too many open files")
        return digest_of(path, *others)

    monkeypatch.setattr(loading, "digest_of", full)
    with pytest.raises(CheckpointError, match=r"iter_0000005/.* cannot be read: Too many open files") as raised:
        load_newest(tmp_path, wanted())
    assert not isinstance(raised.value, DamagedFilesError)


@pytest.mark.parametrize("start", [1900, 2500])
def test_a_part_beyond_the_end_of_its_file_is_refused(
    start: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, 3)
    table = read_table(path)
    (part,) = table.tensors["scalar"].parts
    moved = replace(part, start=(path / part.file).stat().st_size + start - 2000)
    tensors = {**table.tensors, "scalar": replace(table.tensors["scalar"], parts=(moved,))}
    monkeypatch.setattr(loading, "read_table", lambda _: replace(table, tensors=tensors))
    with pytest.raises(CheckpointError, match="the file ends within it"):
        loading.load_checkpoint(path, wanted(), STATE)


def test_a_table_of_contents_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, 3)
    table = read_table(path)
    monkeypatch.setattr(loading, "read_table", lambda _: table)
    (path / ".metadata").write_bytes(b"another")
    with pytest.raises(CheckpointError, match=r"\.metadata differs from what was written"):
        loading.load_checkpoint(path, wanted(), STATE)


def test_a_file_without_a_digest_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, 3)
    content = store.read_train_state(path)
    content["digests"] = {name: d for name, d in content["digests"].items() if not store.is_tensor_file(name)}
    monkeypatch.setattr(loading, "read_train_state", lambda directory: content)
    with pytest.raises(DamagedFilesError, match=r"__0_0\.distcp has no digest in train_state\.json"):
        loading.load_checkpoint(path, wanted(), STATE)


def test_parts_that_share_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, 3)
    table = read_table(path)
    shared = {**table.tensors, "large.1": table.tensors["large.0"]}
    monkeypatch.setattr(loading, "read_table", lambda directory: replace(table, tensors=shared))
    state = {name: replicated(torch.zeros(ROWS, COLUMNS), STATE) for name in ("large.0", "large.1")}
    with pytest.raises(CheckpointError, match=r"large\.[01] cannot be read \(it begins within another part\)"):
        loading.load_checkpoint(path, state, STATE)


def test_each_file_is_digested_by_one_rank_that_wants_it_and_the_work_is_even() -> None:
    names = ["a", "b", "c", "d"]
    sizes = dict.fromkeys(names, 100)
    of = partial(loading._digesting_ranks, names, sizes)
    assert of([{}]) == dict.fromkeys(names, 0)
    own = [{name: 100} for name in reversed(names)]
    assert of(own) == {"a": 3, "b": 2, "c": 1, "d": 0}
    assert sorted(of([sizes, sizes]).values()) == [0, 0, 1, 1], "replicas share the files"
    assert sorted(of([{}] * 4).values()) == [0, 1, 2, 3], "so do ranks that want nothing"
    assert of([{"a": 10}, {"a": 60, "b": 1}, {"a": 100}]) == {"a": 1, "b": 1, "c": 0, "d": 2}


def load_and_count(folder: str) -> tuple[list[float], float, str]:
    """On each of two ranks: the half that it wants, how much of the files it has read, and what is said of damage."""
    parallel = initialize_model_parallel(PretrainConfig().parallel)
    rank, rows = parallel.rank, 400_000
    part = ShardedTensor(torch.full((rows,), 1.0 + rank), (2 * rows,), (rank * rows,), True)
    config = CheckpointConfig(save=folder, load=folder)
    path = saving.save_checkpoint(config, 1, {"x": [part]}, {}, {}, parallel)
    other = ShardedTensor(torch.zeros(rows), (2 * rows,), ((1 - rank) * rows,), True)
    loading.load_checkpoint(path, {"x": [other]}, parallel)
    before = bytes_read()
    loading.load_checkpoint(path, {"x": [other]}, parallel)
    values, share = other.local.unique().tolist(), (bytes_read() - before) / (4 * rows)
    parallel.world.barrier()
    if rank == 0:
        flip(path / "__1_0.distcp")
    parallel.world.barrier()
    with pytest.raises(DamagedFilesError) as caught:
        loading.load_checkpoint(path, {"x": [other]}, parallel)
    return values, share, str(caught.value)


@pytest.mark.distributed
def test_ranks_read_each_file_once_between_them(tmp_path: Path) -> None:
    first, second = run_ranks(partial(load_and_count, str(tmp_path)), 2)
    assert (first[0], second[0]) == ([2.0], [1.0])
    assert 1 < first[1] < 1.1 and 1 < second[1] < 1.1
    assert first[2] == second[2] and "iter_0000001 is damaged: __1_0.distcp differs" in first[2]
