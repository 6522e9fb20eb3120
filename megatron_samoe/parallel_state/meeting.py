"""How ranks agree on who takes part in an attempt, over a store that may still hold what earlier attempts wrote.

torchrun keeps one store for all attempts of a job, so addresses of the dead lie beside those of the living. Each rank
therefore writes a nonce; rank 0 reads all of them and invites their writers to a new *generation*; each accepts the
invitation that carries its own nonce; and when all have, rank 0 opens the generation. A nonce of a dead rank is never
accepted: when the rank that takes its place has written its own, rank 0 invites again. What ranks then tell each other
lies under the generation's name, where nobody else has written.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from torch.distributed import PrefixStore, Store

from megatron_samoe.errors import CommunicationError, JobEndedError

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.25


class Meeting:
    """A rank's part in the meetings of a job.

    Args:
        store: which all ranks of the job share, and may have shared with earlier attempts.
        rank, size: place and number of the ranks that the launcher started.
    """

    def __init__(self, store: Store, rank: int, size: int):
        self._store, self._board = store, PrefixStore("meeting", store)
        self._many_at_once: bool = store.has_extended_api()  # type: ignore[attr-defined]  # missing from torch's stubs
        self._rank, self._everyone = rank, range(size)
        self._nonce = uuid.uuid4().hex[:16]
        self._attempt: Store = self._board
        # Of rank 0: whom it has invited to which generation.
        self._invited: list[str] = []
        self._generation = ""

    def meet(self, timeout_s: float) -> Store:
        """Waits until all ranks of this attempt are there and returns a store that only they use.

        Raises:
            CommunicationError: some do not come in time, and are named.
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

    def end(self, message: str) -> None:
        """Tells the ranks of this attempt and all later ones why the job is not to go on."""
        self._board.set("ended", f"rank {self._rank}: {message}")

    def raise_if_ended(self) -> None:
        """Raises JobEndedError with what `end` said, if a rank did."""
        if self._board.check(["ended"]):
            raise JobEndedError(f"The job was ended by {self._board.get('ended').decode()}")

    def stand_by(self) -> None:
        """Waits, on a rank that the layout has no use for, until the others have finished."""
        while not self._attempt.check(["finished"]):
            self.raise_if_ended()
            time.sleep(1.0)
        self._attempt.set(f"noticed/{self._rank}", "")

    def finish(self, num_ranks: int) -> None:
        """Tells those who stand by that the job is done, and stays until they know: rank 0 may hold the store."""
        self._attempt.set("finished", "")
        until = time.monotonic() + 5.0
        waiting = [f"noticed/{rank}" for rank in self._everyone if rank >= num_ranks]
        while waiting and not self._attempt.check(waiting) and time.monotonic() < until:
            time.sleep(0.1)

    def _be_here(self) -> None:
        """Writes the nonce, again where a rank of an earlier attempt wrote over it before it died."""
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
        """Accepts an invitation of its own, and returns its generation once that is open."""
        if not self._board.check([f"invited/{self._rank}"]):
            return None
        generation, nonce = self._board.get(f"invited/{self._rank}").decode().split()
        if nonce != self._nonce:
            return None
        self._board.set(f"{generation}/accepted/{self._rank}", "")
        return generation if self._board.check([f"{generation}/open"]) else None

    def _absent(self) -> str:
        """Returns who has not written a nonce, or has not accepted."""
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
