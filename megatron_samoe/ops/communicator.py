"""What the compiled all-to-alls have in common: checks, allocation, the gradient's way back, and an agreed start."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_samoe.errors import CommunicationError
from megatron_samoe.log import say_once
from megatron_samoe.parallel_state.state import Group


class Communicator(ABC):
    """A group's uneven all-to-all. Exchanges are numbered: all ranks must call them in the same order.

    After an error it stays unusable, and so do its peers'; make a new one.
    """

    transport = ""  # as it is named in messages

    def __init__(self, group: Group, handle: int, timeout_s: float):
        self.group, self.timeout_s = group, timeout_s
        self._handle: int | None = handle

    @abstractmethod
    def _exchange_bytes(
        self, handle: int, x: Tensor, received: Tensor, send_bytes: list[int], recv_bytes: list[int]
    ) -> str:
        """Does the exchange; returns an empty string, or why it failed."""

    @abstractmethod
    def _abort(self, handle: int, reason: str) -> None: ...

    @abstractmethod
    def _close(self, handle: int) -> None: ...

    def all_to_all_rows(self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Tensor:
        """Returns the rows that all members sent here, in group order; differentiable.

        Args:
            x: [sum(send_rows), ...], rows for member 0 first; any dtype.
            send_rows: rows for each member.
            receive_rows: rows from each member, as the others' send_rows say.

        Errors: CommunicationError where a peer dies, gives up, disagrees about the splits or is silent for timeout_s;
        ValueError where the splits do not fit x.
        """
        received: Tensor = _AllToAllRows.apply(x, list(send_rows), list(receive_rows), self)
        return received

    def exchange(self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Tensor:
        """As all_to_all_rows, not recorded by autograd."""
        if self._handle is None:
            raise CommunicationError(f"The {self.transport} communicator of group {self.group.name!r} is closed.")
        if len(send_rows) != self.group.size or len(receive_rows) != self.group.size or sum(send_rows) != x.shape[0]:
            raise ValueError(
                f"{x.shape[0]} rows in {self.group.size} ranks: send_rows = {list(send_rows)}, "
                f"receive_rows = {list(receive_rows)}"
            )
        row_bytes = x.element_size()
        for size in x.shape[1:]:
            row_bytes *= size
        received = x.new_empty((sum(receive_rows), *x.shape[1:]))
        send_bytes = [rows * row_bytes for rows in send_rows]
        recv_bytes = [rows * row_bytes for rows in receive_rows]
        problem = self._exchange_bytes(self._handle, x.detach().contiguous(), received, send_bytes, recv_bytes)
        if problem:
            raise CommunicationError(f"All-to-all over group {self.group.name!r} through {self.transport}, {problem}")
        return received

    def abort(self, reason: str) -> None:
        """Makes the exchange that this rank is in, and all later ones, fail with the reason."""
        if self._handle is not None:
            self._abort(self._handle, reason)

    def close(self) -> None:
        """Frees what the communicator holds. A peer that still needs this rank gets a CommunicationError."""
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


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send_rows: list[int], receive_rows: list[int], communicator: Communicator
    ) -> Tensor:
        ctx.splits, ctx.communicator = (send_rows, receive_rows), communicator
        return communicator.exchange(x, send_rows, receive_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        send_rows, receive_rows = ctx.splits
        return ctx.communicator.exchange(grad, receive_rows, send_rows), None, None, None


def agreed(group: Group, problem: str, transport: str) -> bool:
    """Returns whether no member has a problem, the same on all; says the first one once. Collective, also a barrier."""
    problems = [text for text in group.all_gather_object(problem) if text]
    if problems:
        say_once(f"Group {group.name!r} exchanges rows through torch, not through {transport}: {problems[0]}.")
    return not problems
