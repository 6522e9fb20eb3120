"""The common part of the compiled all-to-alls: checks, allocation, exchanges in the background, and an agreed start."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.errors import CommunicationError
from megatron_samoe.log import say_once
from megatron_samoe.parallel_state.state import Group, PendingRows

SLICE_S = 0.25  # how long the compiled code works before Python may look at signals


class Communicator:
    """A group's uneven all-to-all. All ranks must call its exchanges in the same order.

    After an error it stays unusable on all ranks; make a new one.

    Args:
        handle: of the compiled communicator; closed with this object.
        timeout_s: longest silence of a peer in an exchange.
    """

    transport = ""  # as it is named in messages
    device_types: tuple[str, ...] = ("cpu",)

    def __init__(self, group: Group, handle: int, timeout_s: float):
        self.group, self.timeout_s = group, timeout_s
        self._handle: int | None = handle
        self._worker: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None  # of the exchanges in the background

    def exchange(self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Tensor:
        """Returns the rows that all members sent here, in group order; not recorded by autograd (see row_exchange/all_to_all.py).

        Args:
            x: [sum(send_rows), ...], rows for member 0 first; any dtype.
            send_rows: rows for each member.
            receive_rows: rows from each member; equal to the members' send_rows for this rank.

        Raises:
            CommunicationError: a peer dies, gives up, disagrees about the splits or is silent for timeout_s.
            ValueError: x is not on the right device or the splits do not fit it; raised before anything is sent.
        """
        with self.group.waits:
            self._wait_for_background()
            received = self._received(x, send_rows, receive_rows)
            self._run(x, received, send_rows, receive_rows)
        return received

    def exchange_evenly(self, x: Tensor) -> Tensor:
        """Returns exchange(x) where every member knows that it sends and receives equal parts."""
        rows = [x.shape[0] // self.group.size] * self.group.size
        return self.exchange(x, rows, rows)

    def exchange_gathered(
        self, x: Tensor, index: Tensor, divisor: int, send_rows: Sequence[int], receive_rows: Sequence[int]
    ) -> Tensor:
        """Returns exchange(rows), where row r is x[index[r] // divisor]; the transport may avoid a copy of the rows."""
        self._wait_for_background()
        return self.exchange(self.gathered(x, index, divisor), send_rows, receive_rows)

    def start(
        self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], out: Tensor | None = None
    ) -> PendingRows:
        """Starts exchange() in the background and returns it. Its wait() gives the rows; x must not change before that.

        Args:
            out: tensor for the rows; a new one if not given.
        """
        received = self._received(x, send_rows, receive_rows, out)
        return self._submit(received, lambda: self._run(x, received, send_rows, receive_rows))

    def start_gathered(
        self,
        x: Tensor,
        index: Tensor,
        divisor: int,
        send_rows: Sequence[int],
        receive_rows: Sequence[int],
        out: Tensor | None = None,
    ) -> PendingRows:
        """Starts exchange_gathered() in the background; neither x nor index may change before wait()."""
        x = x.detach()
        rows = x.new_empty((index.shape[0], *x.shape[1:]), device="meta")
        received = self._received(rows, send_rows, receive_rows, out, x.device)
        return self._submit(
            received, lambda: self._run(self.gathered(x, index, divisor), received, send_rows, receive_rows)
        )

    def gathered(self, x: Tensor, index: Tensor, divisor: int) -> Tensor:
        """Returns rows x[index // divisor], only for the next exchange: a transport may put them where it sends from."""
        rows: Tensor = torch.ops.megatron_samoe.permute(x, index, divisor)
        return rows

    def _submit(self, received: Tensor, work: Callable[[], None]) -> PendingRows:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, f"all-to-all {self.group.name}")
        future = self._last = self._worker.submit(work)

        def finish() -> None:
            # An interrupt the worker does not hear of; the end of the process waits for it.
            with self.group.waits, self._abort_if_interrupted():
                future.result()

        return PendingRows(received, finish)

    def _wait_for_background(self) -> None:
        """Waits for the exchanges started before, so that exchanges keep their order."""
        if self._last is not None:
            with self._abort_if_interrupted():
                wait_for([self._last])  # whose errors are for those who started them
            self._last = None

    def _received(
        self,
        x: Tensor,
        send_rows: Sequence[int],
        receive_rows: Sequence[int],
        out: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Checks the arguments of an exchange and returns the tensor for its rows.

        Args:
            device: of the rows, where x is only a placeholder.
        """
        device = device or x.device
        if self._handle is None:
            raise CommunicationError(f"The {self.transport} communicator of group {self.group.name!r} is closed.")
        check_splits(x, send_rows, receive_rows, self.group.size)
        if device.type not in self.device_types:
            raise ValueError(f"{self.transport} exchanges {self.device_types[0]} tensors; x is on {device}")
        shape = (sum(receive_rows), *x.shape[1:])
        if out is None:
            return x.new_empty(shape, device=device)
        if out.shape != shape or out.dtype != x.dtype or out.device != device:
            raise ValueError(f"out is {out.dtype} {tuple(out.shape)} on {out.device}; {x.dtype} {shape} will come")
        return out

    def _run(self, x: Tensor, received: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> None:
        send_bytes, recv_bytes = bytes_of_rows(x, send_rows, receive_rows)
        self._raise(self._exchange_bytes(x.detach().contiguous(), received, send_bytes, recv_bytes))

    def _exchange_bytes(self, x: Tensor, received: Tensor, send_bytes: list[int], recv_bytes: list[int]) -> str:
        """Makes the exchange; returns an empty string, or why it failed."""
        return self.exchange_parts(x, received, [], send_bytes, [], recv_bytes)

    def exchange_parts(
        self,
        x: Tensor,
        received: Tensor,
        send_offsets: list[int],
        send_bytes: list[int],
        recv_offsets: list[int],
        recv_bytes: list[int],
    ) -> str:
        """Makes the exchange between parts of the tensors that begin at the given bytes (none: one after the other)."""
        with self._abort_if_interrupted():
            exchange, state = torch.ops.megatron_samoe.all_to_all_start(
                self._handle, x, received, send_offsets, send_bytes, recv_offsets, recv_bytes, SLICE_S
            )
            return self._finish(exchange, state)

    @contextlib.contextmanager
    def _abort_if_interrupted(self) -> Iterator[None]:
        """Aborts where an interrupt comes while an exchange begins, since it is then half done on all ranks."""
        try:
            yield
        except KeyboardInterrupt:
            self.abort("interrupted")
            raise

    def _finish(self, exchange: int, state: str) -> str:
        """Runs or awaits an exchange until its rows may be read; returns an empty string, or why it failed."""
        return self._in_slices(state, torch.ops.megatron_samoe.all_to_all_finish, exchange)

    def _in_slices(self, state: str, op: Callable[..., str], *args: Any) -> str:
        """Calls an op again, for a short time each, while the state is pending; returns the last state."""
        while state == "pending":
            if self._handle is None:
                return "the communicator is closed"
            try:
                state = op(self._handle, *args, SLICE_S)
            except BaseException as error:
                self.abort("interrupted" if isinstance(error, KeyboardInterrupt) else str(error))
                raise
        return state

    def _raise(self, problem: str) -> None:
        if problem:
            raise CommunicationError(f"All-to-all over group {self.group.name!r} through {self.transport}, {problem}")

    def check(self) -> None:
        """Raises CommunicationError if an exchange failed after its rows were returned, which can happen on a device.

        Call it when the device has done its work, before results are kept.
        """

    def abort(self, reason: str) -> None:
        """Makes the exchange that this rank is in, and all later ones, fail with the reason."""
        if self._handle is not None:
            torch.ops.megatron_samoe.all_to_all_abort(self._handle, reason)

    def close(self) -> None:
        """Frees what the communicator holds. A peer that still needs this rank gets a CommunicationError.

        Exchanges that were started end first: peers that have begun them wait for this rank's rows.
        """
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown()
        handle, self._handle = self._handle, None
        if handle is not None:
            torch.ops.megatron_samoe.all_to_all_close(handle)

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at interpreter exit torch's ops may be gone
            self.close()


def bytes_of_rows(x: Tensor, *splits: Sequence[int]) -> list[list[int]]:
    """Returns splits that count rows of x as bytes."""
    row_bytes = x.element_size() * math.prod(x.shape[1:])
    return [[rows * row_bytes for rows in split] for split in splits]


def connect(handle: int, addresses: list[str]) -> str:
    """Joins the ranks of these addresses; returns an empty string, or why it failed. Collective."""
    problem: str = torch.ops.megatron_samoe.all_to_all_connect(handle, addresses)
    state = problem or "pending"
    while state == "pending":
        state = torch.ops.megatron_samoe.all_to_all_finish(handle, 0, SLICE_S)
    return state


def check_splits(x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], size: int) -> None:
    """Raises ValueError where rows do not fit the splits: a transport's message would come late, or from another rank."""
    if x.dim() < 1 or x.layout != torch.strided:
        raise ValueError(f"an exchange takes dense rows, not {x.layout} {tuple(x.shape)}")
    if not len(send_rows) == len(receive_rows) == size or sum(send_rows) != x.shape[0]:
        raise ValueError(
            f"{x.shape[0]} rows in {size} ranks: send_rows = {list(send_rows)}, receive_rows = {list(receive_rows)}; both "
            "must have a number for each rank, and send_rows must add up to the rows"
        )
    if min(*send_rows, *receive_rows) < 0:
        raise ValueError(f"send_rows = {list(send_rows)}, receive_rows = {list(receive_rows)}: none may be negative")


def agreed(group: Group, problem: str, transport: str, versions: Mapping[str, str] | None = None) -> bool:
    """Returns whether no member has a problem, the same on all members; logs the first problem once. Collective, also a
    barrier.

    Args:
        versions: of facts that must be equal on all members, by name; one that differs is an error.
    """
    members = group.all_gather_object((problem, dict(versions or {})))
    problems = [text for text, _ in members if text]
    if not problems:
        first, theirs = group.ranks[0], members[0][1]
        problems = [
            f"rank {first} has {name} {theirs[name]} and rank {rank} has {version}; install the same on all hosts"
            for rank, (_, own) in zip(group.ranks, members, strict=True)
            for name, version in own.items()
            if version != theirs[name]
        ]
    if problems:
        say_once(f"Group {group.name!r} exchanges rows through torch, not through {transport}: {problems[0]}.")
    return not problems
