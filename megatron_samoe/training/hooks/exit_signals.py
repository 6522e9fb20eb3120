"""Signals that end a run early, saved: Slurm's warning, torchrun's goodbye, Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from megatron_samoe.dist_checkpointing.store import newest_in_words
from megatron_samoe.errors import HostsLeftError, ToldToLeaveError
from megatron_samoe.parallel_state import launcher
from megatron_samoe.training.hook import Hook, Training

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
#: How long the torchrun of another host may take longer to see what this host's has seen.
PARTING_S = 10.0
#: Ranks that a message names.
_NAMED = 4


class ExitSignals(Hook):
    """Ends a run after the step in which SIGTERM, SIGINT, SIGUSR1 or SIGHUP comes to any rank. A second SIGINT kills.

    Attributes:
        received: by this rank, the first.
        agreed: by any rank, and the reason why all leave.
        notified_ranks: those that had a signal when all agreed, as words.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.agreed: signal.Signals | None = None
        self.notified_ranks: Sequence[str] = ()

    @contextlib.contextmanager
    def around(self, run: Training) -> Iterator[None]:
        """Notes signals, which would end the process; only a process's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def wants_exit(self, run: Training) -> int:
        """Returns the number of the signal that came."""
        return self.received or 0

    def exit_reason(self, run: Training, number: int) -> str:
        """Returns the signal, and the ranks that it came to if it did not come to all."""
        self.agreed = signal.Signals(number)
        hosts = run.setup.parallel.world.all_gather_object(socket.gethostname() if self.received else None)
        self.notified_ranks = [f"rank {rank} ({host})" for rank, host in enumerate(hosts) if host is not None]
        return f"signal {number} received{f' by {self.who}' if None in hosts else ''}"

    @property
    def who(self) -> str:
        """The first of `notified_ranks`."""
        more = f" and {len(self.notified_ranks) - _NAMED} others" if len(self.notified_ranks) > _NAMED else ""
        return ", ".join(self.notified_ranks[:_NAMED]) + more

    def exited(self, run: Training) -> None:
        """Leaves a job of several hosts whose ranks agreed on SIGTERM, so that no torchrun takes its rank for one that is done.

        A torchrun that has sent the signal itself asks for no status: its host leaves, hosts join, or the job is to end.
        Another one tries again. Torchruns of several hosts send it a little sooner or later.

        Raises:
            ToldToLeaveError: the signal came to this rank.
            HostsLeftError: it does not come here.
        """
        if self.agreed != signal.SIGTERM or not launcher.has_other_hosts():
            return
        saved, until = newest_in_words(run.setup.config.checkpoint.save), time.monotonic() + PARTING_S
        while self.received is None:
            if time.monotonic() > until:
                raise HostsLeftError(
                    f"SIGTERM came to {self.who} and not to this rank, which tries again. {saved} "
                    "SIGUSR1 to any rank ends a job on all hosts.",
                    collective=launcher.local_rank() > 0,
                )
            time.sleep(0.05)
        raise ToldToLeaveError(f"SIGTERM came to {self.who}: all ranks leave. {saved}")

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)
