"""An all-to-all over our own NCCL communicator, for groups of CUDA ranks.

NCCL is found at run time (usually torch's own copy); the extension is built without it. A group's communicator is made
from a unique id that its first rank draws and the process group carries to the others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_samoe.ops import extension
from megatron_samoe.parallel_state.state import Group, PendingRows
from megatron_samoe.row_exchange.bulletin import Bulletin
from megatron_samoe.row_exchange.communicator import Communicator, agreed, bytes_of_rows, connect


class OpenedNccl(NamedTuple):
    """A compiled communicator, the stream of its exchanges, and the messages between its members."""

    handle: int
    stream: torch.cuda.Stream
    bulletin: Bulletin | None = None


class NcclCommunicator(Communicator):
    """An all-to-all of device tensors, in the stream of the process's exchanges.

    Exchanges start from one thread at a time, as forward and backward do. Each returns when NCCL has taken it, so a
    process's communicators launch theirs in the program's order, and the one stream keeps it.

    An exchange waits for the earlier work of the current stream. The current stream then waits for the exchange: at
    once, or at wait() of an exchange that was started in the background, which takes no thread. An exchange that a peer
    never joins, or that the device does not finish within timeout_s, is aborted; the bulletin notifies the other members
    within about a second.

    Args:
        opened: what is closed with this object.
    """

    transport = "NCCL"
    device_types = ("cuda",)

    def __init__(self, group: Group, opened: OpenedNccl, timeout_s: float):
        super().__init__(group, opened.handle, timeout_s)
        self._stream, self._bulletin = opened.stream, opened.bulletin

    def exchange_evenly(self, x: Tensor) -> Tensor:
        """Returns exchange(x) where every member knows that it sends and receives equal parts."""
        rows = [x.shape[0] // self.group.size] * self.group.size
        received = self._received(x, rows, rows)
        with self._abort_if_interrupted():
            x = x.detach().contiguous()
            started = torch.ops.megatron_samoe.nccl_start_even(self._handle, x, received)
            self._keep_until_done(x, received)
            self._raise(self._finish(*started))
        return received

    def start(
        self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], out: Tensor | None = None
    ) -> PendingRows:
        """Starts exchange() in the background and returns it; its wait() gives the rows. x must not change before that."""
        received = self._received(x, send_rows, receive_rows, out)
        x = x.detach().contiguous()
        with self._abort_if_interrupted():
            exchange, state = self._start(x, received, *bytes_of_rows(x, send_rows, receive_rows))
            # Before anything else is given to the device; a first exchange with a peer connects to it.
            self._raise(self._in_slices(state, torch.ops.megatron_samoe.nccl_enqueue))

        def finish(_sent: Tensor = x) -> None:  # which lives as long: only a device's memory waits for its stream
            self._raise(self._finish(exchange, "pending"))

        return PendingRows(received, finish)

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
        return self.start(self.gathered(x.detach(), index, divisor), send_rows, receive_rows, out)

    def check(self) -> None:
        """Raises CommunicationError if an exchange was aborted: results computed from its rows are wrong."""
        if self._handle is not None:
            state = torch.ops.megatron_samoe.all_to_all_finish(self._handle, 0, 0.0)
            if state != "pending":
                self._raise(state)

    def abort(self, reason: str) -> None:
        """Makes the exchange that this rank is in, and all later ones, fail with the reason, on all members."""
        super().abort(reason)
        if self._bulletin is not None and self._handle is not None:
            self._bulletin.give_up(reason)

    def close(self) -> None:
        """Frees what the communicator holds. A peer that still needs this rank gets a CommunicationError."""
        if self._bulletin is not None:
            self._bulletin.close()
        super().close()

    def _raise(self, problem: str) -> None:
        if problem and self._bulletin is not None:
            problem += self._bulletin.give_up(problem)
        super()._raise(problem)

    def _exchange_bytes(self, x: Tensor, received: Tensor, send_bytes: list[int], recv_bytes: list[int]) -> str:
        with self._abort_if_interrupted():
            return self._finish(*self._start(x, received, send_bytes, recv_bytes))

    def _start(self, x: Tensor, received: Tensor, send_bytes: list[int], recv_bytes: list[int]) -> tuple[int, str]:
        """Starts an exchange; returns its number and "pending", or why it cannot start."""
        started: tuple[int, str] = torch.ops.megatron_samoe.all_to_all_start(
            self._handle, x, received, [], send_bytes, [], recv_bytes, 0.0
        )
        self._keep_until_done(x, received)
        return started

    def _keep_until_done(self, *tensors: Tensor) -> None:
        """Leaves the memory of tensors to the exchange until the device has done it, whoever drops them before."""
        for tensor in tensors:
            tensor.record_stream(self._stream)


def nccl_problem() -> str:
    """Returns why NCCL cannot be used here, or an empty string."""
    if not extension.load():
        return "the compiled extension is not in use"
    problem: str = torch.ops.megatron_samoe.nccl_problem()
    return problem


def versions() -> dict[str, str]:
    """Returns facts that must be equal on all members of a group."""
    library: str = torch.ops.megatron_samoe.nccl_library()
    return {"NCCL": library.split()[-1], **extension.build_identity()}


def create_nccl_communicator(
    group: Group, timeout_s: float = 600.0, device: torch.device | str = "cuda"
) -> NcclCommunicator | None:
    """Returns the group's NCCL communicator, or None on every rank if one rank cannot have it (logged once).

    Collective: every member of the group calls it.

    Args:
        timeout_s: longest time to connect, and longest time of an exchange.
        device: device of the exchanged tensors; without an index, the current one.
    """
    opened = open_nccl(group, timeout_s, torch.device(device))
    return None if opened is None else NcclCommunicator(group, opened, timeout_s)


def new_handle(rank: int, size: int, device: torch.device, timeout_s: float) -> tuple[int, torch.cuda.Stream]:
    """Returns a compiled communicator that is not connected yet, and the stream of its exchanges.

    Raises:
        RuntimeError: the device or NCCL cannot have it.
    """
    if device.type not in NcclCommunicator.device_types:
        raise RuntimeError(f"NCCL exchanges the memory of GPUs, not of {device}")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    stream = exchange_stream(device)
    return int(torch.ops.megatron_samoe.nccl_create(rank, size, device, stream.cuda_stream, timeout_s)), stream


@functools.cache
def exchange_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the stream of all exchanges on a device. Two communicators' kernels that wait for each other on it
    would hang where ranks run them in different orders.
    """
    # Exchanges go before kernels that wait for the same multiprocessors.
    return torch.cuda.Stream(device, priority=-1)


def open_nccl(group: Group, timeout_s: float, device: torch.device) -> OpenedNccl | None:
    """Returns the compiled communicator of create_nccl_communicator."""
    if group.size == 1:
        return None
    problem = nccl_problem()
    if not agreed(group, problem, NcclCommunicator.transport, {} if problem else versions()):
        return None
    ops = torch.ops.megatron_samoe
    handle, address, stream, bulletin = -1, "", None, None
    try:
        handle, stream = new_handle(group.rank, group.size, device, timeout_s)
        address = ops.all_to_all_address(handle)
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    addresses = group.all_gather_object(address)
    if not problem and all(addresses):
        try:
            bulletin = Bulletin(group, addresses[0], handle, timeout_s)
        except RuntimeError as error:  # of the store; the others come to connect, and fail there
            problem = str(error).splitlines()[0]
        else:
            problem = connect(handle, addresses)
            if problem:
                problem += bulletin.give_up(problem)
    if agreed(group, problem, NcclCommunicator.transport) and bulletin is not None and stream is not None:
        return OpenedNccl(handle, stream, bulletin)
    if bulletin is not None:
        bulletin.close()
    if handle >= 0:
        ops.all_to_all_close(handle)
    return None
