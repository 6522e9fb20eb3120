"""The agreement of ranks on who takes part in an attempt, over a store that may still hold keys of earlier attempts.

torchrun keeps one store for all attempts of a job, so addresses of dead ranks are next to those of living ones.
Therefore each rank writes a nonce. Rank 0 reads all of them and invites their writers to a new *generation*. Each rank
accepts the invitation that carries its own nonce, and when all have, rank 0 opens the generation. No rank accepts the
nonce of a dead one: when its replacement has written its own, rank 0 invites again. Later keys lie under the
generation's name, where no earlier attempt has written.
"""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Mapping, Sequence

from torch.distributed import PrefixStore, Store

from megatron_samoe.errors import (
    CommunicationError,
    ConfigError,
    ConfigErrors,
    HostDiffersError,
    HostRefusedError,
    JobEndedError,
    MegatronSamoeError,
)
from megatron_samoe.parallel_state import launcher
from megatron_samoe.parallel_state.silent_hosts import own_address

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.25
#: How long rank 0 may take to find a fault that all ranks find.
_PATIENCE_S = 2.0
#: A rank's host and facts, by rank.
_Facts = Mapping[int, tuple[str, Mapping[str, str]]]
_DIFFER = "hosts of this job differ:"


class Meeting:
    """A rank's part in the meetings of a job.

    Args:
        store: shared by all ranks of the job, and maybe by earlier attempts.
        rank, size: this rank's number among the ranks that the launcher started, and their count.
        is_member: whether the job is elastic and this rank's host has trained in it before.
    """

    def __init__(self, store: Store, rank: int, size: int, is_member: bool = False):
        self._store, self._board = store, PrefixStore("meeting", store)
        self._many_at_once: bool = store.has_extended_api()  # type: ignore[attr-defined]  # missing from torch's stubs
        self._rank, self._everyone, self._is_member = rank, range(size), is_member
        self._nonce = uuid.uuid4().hex[:16]
        self._attempt: Store = self._board
        #: Names of the job's hosts by address, after `compare`.
        self.hosts: Mapping[str, str] = {}
        # Of rank 0: whom it has invited to which generation.
        self._invited: list[str] = []
        self._generation = ""

    def join(self, timeout_s: float) -> Store:
        """Waits until all ranks of this attempt are there and returns a store that only they use.

        Raises:
            CommunicationError: some ranks do not come in time; the message names them.
            JobEndedError: a rank ended the job; see `end`. Or one cannot come, and there are no members.
            HostRefusedError: a rank cannot come, and the job continues without its host.
        """
        deadline, pause = time.monotonic() + timeout_s, _SHORTEST_PAUSE_S
        if self._is_member:
            self._board.set("members", "")
        while True:
            self.raise_if_ended()
            self._raise_if_one_stays_away()
            self._be_here()
            if self._rank == 0:
                self._invite()
            generation = self._accept()
            if generation is not None:
                self._attempt = PrefixStore(f"generation/{generation}", self._store)
                return self._attempt
            if time.monotonic() > deadline:
                raise CommunicationError(
                    f"Rank {self._rank} of {len(self._everyone)} waited {timeout_s:.0f} s for {self._absent()} to join"
                )
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE_S)

    def compare(self, facts: Mapping[str, str]) -> None:
        """Compares facts that must be equal on all ranks, after the rendezvous: with what rank 0 has, or with what members have.

        Raises:
            ConfigError: on all ranks, the same: a host differs. The message names it, and the difference.
            HostDiffersError, HostRefusedError: on ranks that differ from the members, and on the others.
        """
        if self._is_member:
            self._attempt.set(f"member/{self._rank}", "")
        self._attempt.set(f"facts/{self._rank}", json.dumps([socket.gethostname(), dict(facts), own_address()]))
        if self._rank == 0:
            self._attempt.wait([f"facts/{rank}" for rank in self._everyone])
            hosts, ranks = self._facts()
            self._attempt.set("compared", json.dumps([hosts, differences(ranks)]))
        self.hosts, found = json.loads(self._attempt.get("compared"))
        if found:
            raise self._refusal(found)

    def _facts(self) -> tuple[dict[str, str], _Facts]:
        """Returns the names of hosts by address, and what each rank has."""
        found = {rank: json.loads(self._attempt.get(f"facts/{rank}")) for rank in self._everyone}
        hosts = {address: host for host, _, address in found.values()}
        return hosts, {rank: (host, facts) for rank, (host, facts, _) in found.items()}

    def _refusal(self, found: Sequence[Sequence[str]]) -> MegatronSamoeError:
        """Returns what this rank raises of differences that rank 0 has found."""
        _, ranks = self._facts()
        members = [rank for rank in ranks if self._attempt.check([f"member/{rank}"])]
        self._leave_store()
        first = common({rank: ranks[rank][1] for rank in members})
        if first is None:
            return ConfigErrors([ConfigError(name, value, allowed) for name, value, allowed in found], _DIFFER)
        usual = ranks[first][1]
        if ranks[self._rank][1] != usual:
            mine = differences({first: ranks[first], self._rank: ranks[self._rank]})
            return HostDiffersError([ConfigError(*difference) for difference in mine], _DIFFER)
        others = {rank: has for rank, has in ranks.items() if has[1] != usual}
        theirs = ConfigErrors([ConfigError(*each) for each in differences({first: ranks[first], **others})], _DIFFER)
        return refused([host for host, _ in others.values()], str(theirs))

    def _leave_store(self) -> None:
        """Waits on rank 0, which may hold the store, until others have read what they need."""
        self._attempt.set(f"read/{self._rank}", "")
        until = time.monotonic() + _PATIENCE_S
        while self._rank == 0 and time.monotonic() < until:
            if self._attempt.check([f"read/{rank}" for rank in self._everyone]):
                return
            time.sleep(_SHORTEST_PAUSE_S)

    def compare_problems(self, problem: str, num_ranks: int, wait_s: float) -> tuple[str, list[str]]:
        """Returns what the first rank found that could not connect to others, which may know more than one that only waited, and
        the ranks that do not come here in time, of the first ones. All that live call it.
        """
        here = f"rank {self._rank} ({socket.gethostname()})"
        first = self._attempt.compare_set("unconnected", "", f"{here}: {problem}").decode()
        self._attempt.set(f"unconnected/{self._rank}", "")
        until, absent = time.monotonic() + wait_s, list(range(num_ranks))
        while absent := [rank for rank in absent if not self._attempt.check([f"unconnected/{rank}"])]:
            if time.monotonic() > until:
                break
            time.sleep(_LONGEST_PAUSE_S)
        return first, [f"rank {rank} ({json.loads(self._attempt.get(f'facts/{rank}'))[0]})" for rank in absent]

    def end(self, message: str) -> None:
        """Ends the job: notifies the ranks of this attempt and of all later ones of the reason."""
        self._board.set("ended", f"rank {self._rank} on {socket.gethostname()}: {message}")

    def stay_away(self, message: str) -> None:
        """Notifies the ranks of this attempt that one of its ranks cannot come, and why."""
        self._board.set("away", f"rank {self._rank} on {socket.gethostname()}: {message}")

    def notify(self, error: MegatronSamoeError) -> None:
        """Notifies the other ranks of a permanent fault, and finds out whether rank 0 has one that all should report."""
        if error.permanent and error.ends_job:
            self.end(str(error))
        if self._rank == 0:
            self._attempt.set("shown", "")
        until = time.monotonic() + _PATIENCE_S
        while error.collective and not self._attempt.check(["shown"]):
            time.sleep(_LONGEST_PAUSE_S)
            if time.monotonic() > until:
                error.collective = False

    def raise_if_ended(self) -> None:
        """Raises JobEndedError with what `end` said, if a rank did."""
        if self._board.check(["ended"]):
            raise JobEndedError(f"The job was ended by {self._board.get('ended').decode()}")

    def _raise_if_one_stays_away(self) -> None:
        if not self._board.check(["away"]):
            return
        said = self._board.get("away").decode()
        time.sleep(_PATIENCE_S)  # until all have seen it, and members are here
        if not self._board.check(["members"]):
            raise JobEndedError(f"The job was ended by {said}")
        self._board.delete_key("away")  # which is not for later attempts
        raise refused([said.partition(":")[0].rpartition(" ")[2]], said)

    def stand_by(self) -> None:
        """Waits until the other ranks have finished, on a rank that the layout does not use."""
        while not self._attempt.check(["finished"]):
            self.raise_if_ended()
            time.sleep(1.0)
        self._attempt.set(f"noticed/{self._rank}", "")

    def finish(self, num_ranks: int) -> None:
        """Notifies the spare ranks that the job is done, and waits until they know, since rank 0 may hold the
        store.
        """
        self._attempt.set("finished", "")
        until = time.monotonic() + 5.0
        waiting = [f"noticed/{rank}" for rank in self._everyone if rank >= num_ranks]
        while waiting and not self._attempt.check(waiting) and time.monotonic() < until:
            time.sleep(0.1)

    def _be_here(self) -> None:
        """Writes the nonce, and writes it again where a rank of an earlier attempt overwrote it before it died."""
        key = f"here/{self._rank}"
        if not self._board.check([key]) or self._board.get(key).decode() != self._nonce:
            self._board.set(key, self._nonce)

    def _invite(self) -> None:
        here = [f"here/{rank}" for rank in self._everyone]
        if not self._board.check(here):
            return
        nonces = self._get(here)
        if nonces[0] != self._nonce:
            return  # another rank 0 is alive; the one of the earlier attempt is about to be killed
        if nonces != self._invited:
            self._invited, self._generation = nonces, uuid.uuid4().hex[:16]
            keys = [f"invited/{rank}" for rank in self._everyone]
            self._set(keys, [f"{self._generation} {nonce}" for nonce in nonces])
        if self._board.check([f"{self._generation}/accepted/{rank}" for rank in self._everyone]):
            self._board.set(f"{self._generation}/open", "")

    def _accept(self) -> str | None:
        """Accepts the invitation with its own nonce, and returns the generation once that is open."""
        if not self._board.check([f"invited/{self._rank}"]):
            return None
        generation, nonce = self._board.get(f"invited/{self._rank}").decode().split()
        if nonce != self._nonce:
            return None
        self._board.set(f"{generation}/accepted/{self._rank}", "")
        return generation if self._board.check([f"{generation}/open"]) else None

    def _absent(self) -> str:
        """Returns the ranks that have not written a nonce or not accepted, as words."""
        if self._rank != 0:
            return "rank 0, or for others that it waits for,"
        keys = {rank: f"here/{rank}" for rank in self._everyone}
        if self._board.check(list(keys.values())):
            keys = {rank: f"{self._generation}/accepted/{rank}" for rank in self._everyone}
        return f"ranks {', '.join(str(rank) for rank, key in keys.items() if not self._board.check([key]))}"

    def _set(self, keys: Sequence[str], values: Sequence[str]) -> None:
        if self._many_at_once:
            self._board.multi_set(list(keys), list(values))  # type: ignore[attr-defined]  # missing from torch's stubs
            return
        for key, value in zip(keys, values, strict=True):
            self._board.set(key, value)

    def _get(self, keys: Sequence[str]) -> list[str]:
        if self._many_at_once:
            return [value.decode() for value in self._board.multi_get(list(keys))]  # type: ignore[attr-defined]
        return [self._board.get(key).decode() for key in keys]


def common(members: Mapping[int, object]) -> int | None:
    """Returns the first of an elastic job's members, given with the facts of each, if these are equal; else None."""
    first = next(iter(members), None)
    return None if first is None or any(has != members[first] for has in members.values()) else first


def refused(hosts: Sequence[str], problem: str) -> HostRefusedError:
    """Returns what the others raise where hosts cannot take part in their job: one of their ranks a host shows it."""
    names = ", ".join(dict.fromkeys(hosts))
    return HostRefusedError(
        f"{names} cannot take part in this job, which continues without: {problem}", launcher.local_rank() > 0
    )


def differences(ranks: _Facts) -> list[tuple[str, str, str]]:
    """Returns what differs from the first of ranks, each given as (host, facts), as arguments of ConfigError: the first host
    of each.
    """
    (reference, (first, expected)), *others = ranks.items()
    found = []
    for name in sorted({name for _, facts in ranks.values() for name in facts}):
        usual = expected.get(name, "missing")
        for rank, (host, facts) in others:
            value = facts.get(name, "missing")
            if value != usual:
                there = f"must be equal on all hosts, and is {usual} on {first} (rank {reference})"
                found.append((name, f"{value} on {host} (rank {rank})", there))
                break
    return found
