"""What the compiled all-to-alls have in common: checks, allocation, exchanges in the background, and an agreed start."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from megatron_samoe.errors import CommunicationError
from megatron_samoe.log import say_once
from megatron_samoe.parallel_state.state import Group


class Communicator(ABC):
    """A group's uneven all-to-all. Exchanges are numbered: all ranks must call them in the same order.

    After an error it stays unusable, and so do its peers'; make a new one.
    """

    transport = ""  # as it is named in messages
    device_type = "cpu"

    def __init__(self, group: Group, handle: int, timeout_s: float):
        self.group, self.timeout_s = group, timeout_s
        self._handle: int | None = handle
        self._worker: ThreadPoolExecutor | None = None

    @abstractmethod
    def _exchange_bytes(
        self, handle: int, x: Tensor, received: Tensor, send_bytes: list[int], recv_bytes: list[int]
    ) -> str:
        """Does the exchange; returns an empty string, or why it failed."""

    @abstractmethod
    def _abort(self, handle: int, reason: str) -> None: ...

    @abstractmethod
    def _close(self, handle: int) -> None: ...

    def exchange(self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Tensor:
        """Returns the rows that all members sent here, in group order; not recorded by autograd (see ops/all_to_all.py).

        Args:
            x: [sum(send_rows), ...], rows for member 0 first; any dtype.
            send_rows: rows for each member.
            receive_rows: rows from each member, as the others' send_rows say.

        Errors: CommunicationError where a peer dies, gives up, disagrees about the splits or is silent for timeout_s;
        ValueError, before anything is sent, where x is not on the right device or the splits do not fit it.
        """
        if self._worker is not None:  # exchanges keep their order
            return self.start(x, send_rows, receive_rows).wait()
        received = self._received(x, send_rows, receive_rows)
        self._run(x, received, send_rows, receive_rows)
        return received

    def start(self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Pending:
        """As exchange, in the background: x must not change before wait() of what is returned, which has the rows."""
        received = self._received(x, send_rows, receive_rows)
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, f"all-to-all {self.group.name}")
        return Pending(received, self._worker.submit(self._run, x, received, send_rows, receive_rows))

    def exchange_gathered(
        self, x: Tensor, index: Tensor, divisor: int, send_rows: Sequence[int], receive_rows: Sequence[int]
    ) -> Tensor:
        """Returns exchange(rows), where row r is x[index[r] // divisor]; the transport may save a copy of the rows."""
        return self.exchange(torch.ops.megatron_samoe.permute(x, index, divisor), send_rows, receive_rows)

    def _received(self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Tensor:
        """Checks the arguments of an exchange and returns where its rows will be."""
        if self._handle is None:
            raise CommunicationError(f"The {self.transport} communicator of group {self.group.name!r} is closed.")
        check_splits(x, send_rows, receive_rows, self.group.size)
        if x.device.type != self.device_type:
            raise ValueError(f"{self.transport} exchanges {self.device_type} tensors; x is on {x.device}")
        return x.new_empty((sum(receive_rows), *x.shape[1:]))

    def _run(self, x: Tensor, received: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> None:
        row_bytes = x.element_size() * math.prod(x.shape[1:])
        send_bytes = [rows * row_bytes for rows in send_rows]
        recv_bytes = [rows * row_bytes for rows in receive_rows]
        assert self._handle is not None
        self._raise(self._exchange_bytes(self._handle, x.detach().contiguous(), received, send_bytes, recv_bytes))

    def _raise(self, problem: str) -> None:
        if problem:
            raise CommunicationError(f"All-to-all over group {self.group.name!r} through {self.transport}, {problem}")

    def abort(self, reason: str) -> None:
        """Makes the exchange that this rank is in, and all later ones, fail with the reason."""
        if self._handle is not None:
            self._abort(self._handle, reason)

    def close(self) -> None:
        """Frees what the communicator holds. A peer that still needs this rank gets a CommunicationError."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown(wait=True, cancel_futures=True)
        handle, self._handle = self._handle, None
        if handle is not None:
            self._close(handle)

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at interpreter exit torch's ops may be gone
            self.close()


class Pending:
    """An exchange under way."""

    def __init__(self, received: Tensor, future: Future[None] | None):
        self.received, self._future = received, future

    def wait(self) -> Tensor:
        """Returns the received rows; raises what the exchange raised."""
        if self._future is not None:
            self._future.result()
        return self.received


def check_splits(x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], size: int) -> None:
    """ValueError where rows do not fit the splits: a transport's own message would come late, or from another rank."""
    if x.dim() < 1 or x.layout != torch.strided:
        raise ValueError(f"an exchange takes dense rows, not {x.layout} {tuple(x.shape)}")
    if not len(send_rows) == len(receive_rows) == size or sum(send_rows) != x.shape[0]:
        raise ValueError(
            f"{x.shape[0]} rows in {size} ranks: send_rows = {list(send_rows)}, receive_rows = {list(receive_rows)}"
        )
    if min(*send_rows, *receive_rows) < 0:
        raise ValueError(f"send_rows = {list(send_rows)}, receive_rows = {list(receive_rows)}: none may be negative")


def agreed(group: Group, problem: str, transport: str) -> bool:
    """Returns whether no member has a problem, the same on all; says the first one once. Collective, also a barrier."""
    problems = [text for text in group.all_gather_object(problem) if text]
    if problems:
        say_once(f"Group {group.name!r} exchanges rows through torch, not through {transport}: {problems[0]}.")
    return not problems
