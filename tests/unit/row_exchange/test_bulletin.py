"""What the ranks of NCCL communicators ask of the job's one store."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch.distributed import HashStore, PrefixStore

from megatron_samoe.ops import extension
from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange import bulletin

pytestmark = pytest.mark.skipif(not extension.available(), reason="the compiled extension is not built")


class Job:
    """The boards of a group, over one store; `position` is what each rank's communicator says of itself."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch):
        self.stores: list[Mock] = []
        self.position = [(1, -1, "")] * size
        self.aborted: dict[int, str] = {}
        store = HashStore()

        def connection(_handle: object, prefix: str) -> Mock:
            """A store that counts requests, and says that one may read several keys."""
            counted = Mock(wraps=PrefixStore(prefix, store), has_extended_api=lambda: True)
            self.stores.append(counted)
            return counted

        monkeypatch.setattr(bulletin, "_connection", connection)
        ops = torch.ops.megatron_samoe
        monkeypatch.setattr(ops, "nccl_position", lambda rank: self.position[rank])
        monkeypatch.setattr(ops, "all_to_all_abort", self.aborted.__setitem__)
        handle = SimpleNamespace()  # of the process group, which only _connection asks
        self.boards = [bulletin._Board(Group("ep", range(size), rank, handle), "x", rank) for rank in range(size)]

    def requests(self) -> int:
        return sum(len(store.method_calls) for store in self.stores)

    def look(self) -> int:
        """All ranks look once; returns the largest number of requests of one of them."""
        most = 0
        for rank, board in enumerate(self.boards):
            if rank not in self.aborted:
                before = self.requests()
                board.look()
                most = max(most, self.requests() - before)
        return most


@pytest.mark.parametrize("size", [2, 64])
def test_a_look_takes_few_requests_however_large_the_group(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(size, monkeypatch)
    job.position = [(exchange, -1, "") for exchange in range(size)]
    assert [job.look() for _ in range(3)] == [1] * 3  # no news
    job.position = [(8, 8, "")] * (size - 1) + [(7, -1, "")]
    assert max(job.look() for _ in range(6)) <= bulletin.REQUESTS_PER_LOOK
    assert job.boards[0].missing == f"; in exchange 8 these ranks are missing: {size - 1} (last in 7)"
    job.position = [(9, -1, "")] * size
    assert job.look() <= bulletin.REQUESTS_PER_LOOK  # the others still say where they are
    assert job.look() <= 2
    job.boards[1].give_up("enough")
    job.position[1] = (9, -1, "enough")
    assert job.look() <= bulletin.REQUESTS_PER_LOOK
    assert job.aborted[0] == f"rank 0 of {size}, exchange 9: rank 1 gave up: enough"
    assert set(job.aborted) == set(range(size)) - {1}


def test_a_question_does_not_hide_that_a_rank_gave_up(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(3, monkeypatch)
    job.boards[2].give_up("enough")
    job.position[2] = (1, -1, "enough")
    job.boards[0]._telling.set("news", "where are you")  # of a rank that looked just before
    job.look()
    assert set(job.aborted) == {0, 1}


def test_the_store_has_a_bounded_load_and_small_jobs_hear_within_a_second() -> None:
    for ranks in (1, 2, 8, 100, 500):
        assert bulletin.look_s(ranks) == 0.5
    for ranks in (1, 8, 500, 1000, 4096, 16384, 100_000):
        assert bulletin.REQUESTS_PER_LOOK * ranks / bulletin.look_s(ranks) <= 4000
    assert bulletin.look_s(4096) < 5
