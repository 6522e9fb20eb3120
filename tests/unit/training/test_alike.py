"""What hosts of a job must have alike, and that all see what the others write to --save."""

from __future__ import annotations

import socket
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from megatron_samoe.config.data import DataConfig
from megatron_samoe.datasets.preprocess.options import PreprocessOptions
from megatron_samoe.datasets.preprocess.run import preprocess
from megatron_samoe.dist_checkpointing.folder_lock import NAME
from megatron_samoe.errors import ConfigError, ConfigErrors, HostDiffersError, HostRefusedError, MegatronSamoeError
from megatron_samoe.parallel_state import launcher
from megatron_samoe.parallel_state.meeting import Meeting
from megatron_samoe.training.machine import alike_facts
from megatron_samoe.training.save_folder import _refuse_unshared
from tests.harness.program import write_corpus
from tests.harness.tiny import tiny_config


def facts(data: DataConfig | None = None, **options: object) -> dict[str, str]:
    config = tiny_config(**options)
    return alike_facts(replace(config, data=data) if data else config, torch.device("cpu"))


def test_a_difference_of_options_data_and_environment_is_one_fact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(data_path=(str(write_corpus(tmp_path / "corpus")),))
    usual = facts(data)
    assert facts(data) == usual
    assert facts(replace(data, data_cache_path="/local")) == usual, "a folder of the host"

    def changed(others: dict[str, str]) -> set[str]:
        return {name for name in usual.keys() | others.keys() if usual.get(name) != others.get(name)}

    assert changed(facts(data, lr=0.5)) == {"--lr"}
    monkeypatch.setenv("MEGATRON_SAMOE_BF16_PRODUCTS", "widened")
    assert changed(facts(data)) == {"MEGATRON_SAMOE_BF16_PRODUCTS"}
    monkeypatch.delenv("MEGATRON_SAMOE_BF16_PRODUCTS")
    with open(tmp_path / "corpus.bin", "r+b") as file:
        file.write(b"\7")
    assert changed(facts(data)) == {f"{tmp_path / 'corpus'}.bin"}
    (tmp_path / "corpus.idx").unlink()
    assert facts(data)[f"{tmp_path / 'corpus'}.idx"] == "No such file or directory"


@pytest.mark.parametrize("size", [70_000, 300_000, 100_000_007])
def test_data_that_differ_anywhere_differ(size: int, tmp_path: Path) -> None:
    """A stretch of a 250th of a file, wherever it begins; of a small file any byte."""
    path = tmp_path / "corpus.bin"
    write_corpus(tmp_path / "corpus")
    data = DataConfig(data_path=(str(tmp_path / "corpus"),))

    def written(at: int | None, length: int) -> str:
        with open(path, "wb") as file:
            file.truncate(size)
            if at is not None:
                file.seek(at)
                file.write(b"\1" * length)
        return facts(data)[str(path)]

    usual, length = written(None, 0), 1 if size < 1e6 else size // 250
    for share in (0, 0.001, 0.2, 0.5004, 0.777, 0.99, 1):
        assert written(int(share * (size - length)), length) != usual, share


def test_data_that_another_program_wrote_differ_by_its_checksum(tmp_path: Path) -> None:
    """What two blocks have between them, the preprocessor has noted."""
    data = DataConfig(data_path=(str(tmp_path / "out_text_document"),))
    found = []
    for text in ("one text", "two text"):
        (tmp_path / "in.jsonl").write_text(f'{{"text": "{text}"}}')
        preprocess(
            PreprocessOptions((str(tmp_path / "in.jsonl"),), str(tmp_path / "out"), executor="inline", quiet=True)
        )
        found.append(facts(data)[f"{tmp_path / 'out_text_document'}.manifest.json"])
        for path in tmp_path.glob("out*"):
            path.unlink()
    crc = zlib.crc32(np.array([*b"two text"], np.uint16).tobytes())
    assert found[0] != found[1] and found[1].endswith(f"CRC-32 {crc:08x}"), found


def on_hosts(monkeypatch: pytest.MonkeyPatch, number: int, run: Callable[[int], object]) -> dict[int, Any]:
    """Runs a function for ranks, each on a host of its own; returns what they raise."""
    host = threading.local()
    monkeypatch.setattr(socket, "gethostname", lambda: host.name)

    def one(rank: int) -> MegatronSamoeError | None:
        host.name = f"host{rank}"
        try:
            run(rank)
        except MegatronSamoeError as error:
            return error
        return None

    with ThreadPoolExecutor(number) as threads:
        return {rank: error for rank, error in enumerate(threads.map(one, range(number), timeout=20)) if error}


def compared(
    ranks: Sequence[Mapping[str, str]], members: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> dict[int, Any]:
    """Lets ranks meet and compare what they have; returns what they raise."""
    store = HashStore()

    def meet(rank: int) -> None:
        meeting = Meeting(store, rank, len(ranks), rank in members)
        meeting.join(10)
        meeting.compare(ranks[rank])

    return on_hosts(monkeypatch, len(ranks), meet)


def test_all_ranks_hear_which_host_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not compared([{"torch": "2.13"}] * 3, [], monkeypatch)
    usual = {"torch": "2.13", "--lr": "1"}
    raised = compared([usual, {**usual, "x": "y"}, {**usual, "--lr": "2"}], [], monkeypatch)
    assert len(raised) == 3 and len({str(error) for error in raised.values()}) == 1
    assert all(error.permanent and error.ends_job for error in raised.values())
    assert "--lr = '2 on host2 (rank 2)': must be equal on all hosts, and is 1 on host0" in str(raised[0])
    assert "x = 'y on host1 (rank 1)'" in str(raised[0]) and "is missing on host0" in str(raised[0])


def test_a_host_that_comes_to_an_elastic_job_is_measured_by_those_that_were_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual, other = {"torch": "2.13"}, {"torch": "2.14"}
    raised = compared([other, usual, usual, {**usual, "x": "y"}, usual], [1, 2], monkeypatch)
    assert isinstance(raised[0], HostDiffersError) and isinstance(raised[3], HostDiffersError)
    assert raised[0].permanent and not raised[0].ends_job, "its torchrun ends, and the job does not"
    problems = (
        "torch = '2.14 on host0 (rank 0)': must be equal on all hosts, and is 2.13 on host1 (rank 1)",
        "x = 'y on host3 (rank 3)': must be equal on all hosts, and is missing on host1 (rank 1)",
    )
    for rank, problem in zip((0, 3), problems, strict=True):
        assert str(raised[rank]) == f"{problem}; the job continues without this host"
    for rank in (1, 2, 4):
        assert isinstance(raised[rank], HostRefusedError) and not raised[rank].permanent
        assert str(raised[rank]).startswith(
            "host0, host3 cannot take part in this job, which continues without: hosts of"
        )
        assert all(problem in str(raised[rank]) for problem in problems)


def test_members_that_have_changed_end_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can say which of them is as the job began."""
    raised = compared([{"x": "1"}, {"x": "2"}, {"x": "1"}], [0, 1], monkeypatch)
    assert {type(error) for error in raised.values()} == {ConfigErrors} and len(raised) == 3


USUAL, OTHER = "usual", "other"


def apart(folders: list[str], members: list[int], root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Returns what ranks raise that have one of two folders at --save."""
    for folder in (USUAL, OTHER):
        (root / folder).mkdir()
    (root / folders[0] / NAME).write_text("rank 0")
    values, barrier = [None] * len(folders), threading.Barrier(len(folders), timeout=10)

    def own_rank() -> int:
        return int(socket.gethostname().removeprefix("host"))

    def gather(value: Any) -> list[Any]:
        values[own_rank()] = value
        barrier.wait()
        gathered = list(values)
        barrier.wait()
        return gathered

    monkeypatch.setattr(launcher, "is_member", lambda: own_rank() in members)
    parallel: Any = SimpleNamespace(world=SimpleNamespace(all_gather_object=gather))
    return on_hosts(
        monkeypatch, len(folders), lambda rank: _refuse_unshared(root / folders[rank], parallel, 0.0, elastic=True)
    )


@pytest.mark.parametrize("spare", [0, 2])
def test_a_spare_without_the_folder_is_refused(spare: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is the first rank, whose files the others do not see."""
    folders = [OTHER if rank == spare else USUAL for rank in range(3)]
    found = apart(folders, [rank for rank in range(3) if rank != spare], tmp_path, monkeypatch)
    assert len(found) == 3
    for rank, error in found.items():
        assert isinstance(error, HostDiffersError if rank == spare else HostRefusedError)
        assert "must be a folder that all hosts share" in str(error) and f"host{spare}" in str(error)


def test_hosts_that_begin_apart_end_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = apart([USUAL, OTHER], [], tmp_path, monkeypatch)
    assert [type(error) for error in found.values()] == [ConfigError] * 2
