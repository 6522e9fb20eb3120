"""The agreement of ranks on who takes part in an attempt, over a store that may still hold keys of earlier attempts.

torchrun keeps one store for all attempts of a job, so addresses of dead ranks lie beside those of living ones.
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

from megatron_samoe.errors import CommunicationError, ConfigError, ConfigErrors, JobEndedError, MegatronSamoeError
from megatron_samoe.parallel_state.silent_hosts import own_address

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.25
#: How long rank 0 may take to meet what all ranks meet.
_PATIENCE_S = 2.0


class Meeting:
    """A rank's part in the meetings of a job.

    Args:
        store: shared by all ranks of the job, and maybe by earlier attempts.
        rank, size: this rank's place among the ranks that the launcher started, and their number.
    """

    def __init__(self, store: Store, rank: int, size: int):
        self._store, self._board = store, PrefixStore("meeting", store)
        self._many_at_once: bool = store.has_extended_api()  # type: ignore[attr-defined]  # missing from torch's stubs
        self._rank, self._everyone = rank, range(size)
        self._nonce = uuid.uuid4().hex[:16]
        self._attempt: Store = self._board
        #: Names of the job's hosts by address, after `compare`.
        self.hosts: Mapping[str, str] = {}
        # Of rank 0: whom it has invited to which generation.
        self._invited: list[str] = []
        self._generation = ""

    def meet(self, timeout_s: float) -> Store:
        """Waits until all ranks of this attempt are there and returns a store that only they use.

        Raises:
            CommunicationError: some ranks do not come in time; the message names them.
            JobEndedError: a rank ended the job; see `end`.
        """
        deadline, pause = time.monotonic() + timeout_s, _SHORTEST_PAUSE_S
        while True:
            self.raise_if_ended()
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
        """Compares what must be alike on all ranks with what rank 0 has, after they met.

        Raises:
            ConfigError: on all ranks, the same: a host differs. The message names it, and the difference.
        """
        keys = [f"facts/{rank}" for rank in self._everyone]
        self._attempt.set(keys[self._rank], json.dumps([socket.gethostname(), dict(facts), own_address()]))
        if self._rank == 0:
            self._attempt.wait(keys)
            ranks = [json.loads(self._attempt.get(key)) for key in keys]
            hosts = {address: host for host, _, address in ranks}
            self._attempt.set("compared", json.dumps([hosts, differences([rank[:2] for rank in ranks])]))
        self.hosts, found = json.loads(self._attempt.get("compared"))
        if found:
            raise ConfigErrors([ConfigError(*difference) for difference in found], "hosts of this job differ:")

    def end(self, message: str) -> None:
        """Ends the job: tells the ranks of this attempt and of all later ones why."""
        self._board.set("ended", f"rank {self._rank} on {socket.gethostname()}: {message}")

    def tell(self, error: MegatronSamoeError) -> None:
        """Tells the other ranks of a fault that does not pass, and finds out whether rank 0 shows one that all should meet."""
        if error.permanent:
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

    def stand_by(self) -> None:
        """Waits until the other ranks have finished, on a rank that the layout does not use."""
        while not self._attempt.check(["finished"]):
            self.raise_if_ended()
            time.sleep(1.0)
        self._attempt.set(f"noticed/{self._rank}", "")

    def finish(self, num_ranks: int) -> None:
        """Tells the ranks that stand by that the job is done, and waits until they know, since rank 0 may hold the
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


def differences(ranks: Sequence[tuple[str, Mapping[str, str]]]) -> list[tuple[str, str, str]]:
    """Returns what differs between ranks, each given as (host, facts), as arguments of ConfigError: the first host of each."""
    first, expected = ranks[0]
    found = []
    for name in sorted({name for _, facts in ranks for name in facts}):
        usual = expected.get(name, "missing")
        for rank, (host, facts) in enumerate(ranks):
            value = facts.get(name, "missing")
            if value != usual:
                there = f"must be alike on all hosts, and is {usual} on {first} (rank 0)"
                found.append((name, f"{value} on {host} (rank {rank})", there))
                break
    return found
