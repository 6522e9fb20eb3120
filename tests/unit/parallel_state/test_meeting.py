"""Ranks find the ranks of their own attempt in a store full of what earlier attempts wrote."""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from torch.distributed import FileStore, HashStore, Store

from megatron_samoe.errors import (
    CommunicationError,
    ConfigError,
    HostDiffersError,
    HostRefusedError,
    JobEndedError,
    MegatronSamoeError,
)
from megatron_samoe.parallel_state import meeting as module
from megatron_samoe.parallel_state.backend import shared_fate
from megatron_samoe.parallel_state.meeting import Meeting


def stores(kind: str, folder: Path) -> Callable[[], Store]:
    """Returns what opens one store, which all ranks share."""
    if kind == "file":
        return lambda: FileStore(str(folder / "store"), 10)
    shared = HashStore()
    return lambda: shared


def together(*calls: Callable[[], object]) -> None:
    """Makes calls in threads, and waits for their ends."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)
        assert not thread.is_alive()


def meet(
    open_store: Callable[[], Store], size: int, ranks: range | None = None, timeout_s: float = 10.0
) -> dict[int, str]:
    """Lets ranks meet, and returns for each what all of them read where rank 0 wrote, or the error."""
    found: dict[int, str] = {}

    def one(rank: int) -> None:
        try:
            store = Meeting(open_store(), rank, size).join(timeout_s)
            if rank == 0:
                store.set("address", uuid.uuid4().hex)
            found[rank] = store.get("address").decode()
        except CommunicationError as error:
            found[rank] = str(error)

    together(*(partial(one, rank) for rank in (range(size) if ranks is None else ranks)))
    return found


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_each_attempt_reads_only_its_own(kind: str, tmp_path: Path) -> None:
    open_store = stores(kind, tmp_path)
    addresses = []
    for size in (4, 4, 2, 3):  # the same ranks again, then fewer, then more
        found = meet(open_store, size)
        assert len(found) == size and len(set(found.values())) == 1
        addresses.append(found[0])
    assert len(set(addresses)) == len(addresses)


def test_a_dead_rank_is_waited_for_and_named(tmp_path: Path) -> None:
    """Its nonce is there, of an earlier attempt: rank 0 invites it, and nobody accepts."""
    open_store = stores("memory", tmp_path)
    meet(open_store, 3)
    found = meet(open_store, 3, ranks=range(2), timeout_s=1.0)
    assert "Rank 0 of 3 waited 1 s for ranks 2 to join" in found[0]
    assert "waited 1 s for rank 0, or for others" in found[1]
    assert "Rank 0 of 2 waited 1 s for ranks 1 to" in meet(stores("memory", tmp_path), 2, range(1), timeout_s=1.0)[0]


def test_a_late_rank_of_an_earlier_attempt_cannot_take_the_place_of_a_new_one(tmp_path: Path) -> None:
    """It wrote its nonce over the new rank's, just before it was killed."""
    open_store = stores("memory", tmp_path)
    late = Meeting(open_store(), 1, 2)
    timer = threading.Timer(0.3, late._be_here)
    timer.start()
    results: dict[int, str] = {}

    def new(rank: int, delay: float) -> None:
        threading.Event().wait(delay)
        store = Meeting(open_store(), rank, 2).join(10.0)
        store.set(str(rank), "")
        store.wait(["0", "1"])
        results[rank] = "met"

    together(partial(new, 1, 0.0), partial(new, 0, 0.6))
    assert results == {0: "met", 1: "met"}


def test_who_stands_by_leaves_with_the_others() -> None:
    """Of their own attempt: what an earlier one left behind tells nothing."""
    store = HashStore()
    for _ in range(2):
        meetings = [Meeting(store, rank, 3) for rank in range(3)]
        together(*(partial(meeting.join, 10.0) for meeting in meetings))
        spare = threading.Thread(target=meetings[2].stand_by)
        spare.start()
        spare.join(0.3)
        assert spare.is_alive()
        meetings[0].finish(2)
        spare.join(5)
        assert not spare.is_alive()


def test_a_fault_that_does_not_pass_ends_all_attempts() -> None:
    store = HashStore()
    meetings = [Meeting(store, rank, 2) for rank in range(2)]

    class Permanent(MegatronSamoeError):
        permanent = True

    with pytest.raises(Permanent), shared_fate(meetings[1]):
        raise Permanent("this file is damaged")
    with pytest.raises(JobEndedError, match=r"ended by rank 1 on .*: this file is damaged"), shared_fate(meetings[0]):
        raise CommunicationError("rank 1 is gone")
    with pytest.raises(JobEndedError, match="ended by rank 1"):
        Meeting(store, 0, 2).join(1.0)


def test_a_host_that_cannot_come_ends_no_elastic_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.5)
    store = HashStore()
    Meeting(store, 3, 4).stay_away("this file is missing")
    raised: list[HostRefusedError] = []

    def come(rank: int) -> None:
        with pytest.raises(HostRefusedError) as caught:
            Meeting(store, rank, 4, is_member=rank < 2).join(5.0)
        raised.append(caught.value)

    together(*(partial(come, rank) for rank in range(3)))
    here = socket.gethostname()
    said = f"{here} cannot take part in this job, which continues without: rank 3 on {here}: this file is missing"
    assert [str(error) for error in raised] == [said] * 3 and not raised[0].permanent
    assert len(set(meet(lambda: store, 3).values())) == 1, "the next attempt knows nothing of it"


def test_a_host_that_cannot_come_ends_a_job_that_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.1)
    store = HashStore()
    Meeting(store, 1, 2).stay_away("this file is missing")
    with pytest.raises(JobEndedError, match=r"ended by rank 1 on .*: this file is missing"):
        Meeting(store, 0, 2).join(5.0)


def test_a_fault_of_a_host_that_differs_is_none_of_the_job() -> None:
    meetings = [Meeting(HashStore(), rank, 2) for rank in range(2)]
    with (
        pytest.raises(HostDiffersError, match="--save = '/x': is not shared; the job continues"),
        shared_fate(meetings[0]),
    ):
        raise HostDiffersError([ConfigError("--save", "/x", "is not shared")])
    meetings[1].raise_if_ended()


def test_a_peer_that_gloo_misses_is_the_fault_that_ended_the_job() -> None:
    store = HashStore()
    Meeting(store, 1, 2).end("the disk of rank 1 is read-only")
    with pytest.raises(JobEndedError, match=r"ended by rank 1 on .*: the disk"), shared_fate(Meeting(store, 0, 2)):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")
    with pytest.raises(CommunicationError, match="Another rank was lost"), shared_fate(Meeting(HashStore(), 0, 2)):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")
    with pytest.raises(RuntimeError, match="a bug"), shared_fate(Meeting(HashStore(), 0, 2)):
        raise RuntimeError("a bug")


def test_a_fault_that_passes_is_not_told() -> None:
    meeting = Meeting(HashStore(), 0, 2)
    with pytest.raises(CommunicationError, match="rank 1 is gone"), shared_fate(meeting):
        raise CommunicationError("rank 1 is gone")
    meeting.raise_if_ended()
