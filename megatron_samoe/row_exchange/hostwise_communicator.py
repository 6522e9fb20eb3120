"""An all-to-all over several hosts: shared memory inside a host, torch's sends between hosts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_samoe.parallel_state.state import Group
from megatron_samoe.row_exchange.communicator import Communicator

_NO_HANDLE = 0  # the number of no compiled communicator


class HostwiseCommunicator(Communicator):
    """An all-to-all of CPU tensors between processes of several hosts.

    Rows for other hosts are sent from and received into the callers' tensors, while the host's own rows go through
    shared memory. An abort reaches the members on this host at once, and others when their receives fail or time out.
    An interrupt takes effect when torch's waits end, at the latest at the process group's time-out.

    Args:
        local: communicator of the members on this host; closed with this object.
        here: their ranks in the group.
    """

    transport = "shared memory and torch"

    def __init__(self, group: Group, local: Communicator, here: list[int], timeout_s: float):
        super().__init__(group, _NO_HANDLE, timeout_s)
        self._local, self._here = local, here
        self._failed = ""

    def _exchange_bytes(self, x: Tensor, received: Tensor, send_bytes: list[int], recv_bytes: list[int]) -> str:
        if self._failed:
            return self._failed
        sends, receives = _bytes_of(x), _bytes_of(received)
        send_offsets, recv_offsets = _starts(send_bytes), _starts(recv_bytes)
        transfers = []
        for step in range(1, self.group.size):
            to, source = (self.group.rank + step) % self.group.size, (self.group.rank - step) % self.group.size
            if recv_bytes[source] and source not in self._here:
                part = receives[recv_offsets[source] : recv_offsets[source] + recv_bytes[source]]
                transfers.append((source, "from", partial(self._receive, part, source)))
            if send_bytes[to] and to not in self._here:
                part = sends[send_offsets[to] : send_offsets[to] + send_bytes[to]]
                transfers.append((to, "to", partial(self._send, part, to)))
        # Where a peer has died, a transfer may fail when it is begun as well as later.
        works = [(peer, direction, _attempt(begin)) for peer, direction, begin in transfers]
        own = [[values[rank] for rank in self._here] for values in (send_offsets, send_bytes, recv_offsets, recv_bytes)]
        problem = _first_failure([work for work in works if isinstance(work[2], RuntimeError)])
        of_host = "" if problem else self._local.exchange_parts(x, received, *own)
        problem = problem or ("" if of_host else _first_failure(works))
        if problem:
            self._local.abort(problem)
        problem = problem or of_host
        self._failed = problem
        return problem

    def _send(self, part: Tensor, to: int) -> dist.Work | None:
        return dist.isend(part, self.group.ranks[to], group=self.group.handle)

    def _receive(self, part: Tensor, source: int) -> dist.Work | None:
        return dist.irecv(part, self.group.ranks[source], group=self.group.handle)

    def abort(self, reason: str) -> None:
        """Makes the exchange that this rank is in, and all later ones, fail with the reason."""
        self._failed = self._failed or reason
        self._local.abort(reason)

    def close(self) -> None:
        """Frees what the communicator holds."""
        super().close()
        self._local.close()


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)


def _starts(sizes: list[int]) -> list[int]:
    return [0, *accumulate(sizes)][: len(sizes)]


def _attempt(begin: Callable[[], dist.Work | None]) -> dist.Work | RuntimeError | None:
    try:
        return begin()
    except RuntimeError as error:
        return error


def _first_failure(works: Sequence[tuple[int, str, dist.Work | RuntimeError | None]]) -> str:
    """Waits for all transfers; returns an empty string, or what failed."""
    for peer, direction, work in works:
        try:
            if isinstance(work, RuntimeError):
                raise work
            if work is not None:
                work.wait()
        except RuntimeError as error:
            return f"transfer {direction} rank {peer}: {str(error).splitlines()[0]}"
    return ""
