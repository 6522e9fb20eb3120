"""The rank's parallel state: a frozen value that is passed, never stored in a module."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_samoe.config.parallel import ParallelConfig
from megatron_samoe.parallel_state.rank_grid import GROUPS, RankGrid
from megatron_samoe.parallel_state.token_share import TokenShare

# torch 2.13 renames the collective and warns at the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def connecting_time(num_ranks: int, timeout: timedelta) -> timedelta:
    """Returns how long ranks may take to connect after the rendezvous: seconds where all are well. One that is lost then is not waited
    for until the time-out of their exchanges.
    """
    return min(timeout, timedelta(seconds=60 + num_ranks / 10))


class PendingRows:
    """An exchange of rows that runs in the background.

    Args:
        received: the tensor for its rows.
        finish: waits for the end, and raises what the exchange raised.
    """

    def __init__(self, received: Tensor, finish: Callable[[], object]):
        self._received, self._finish = received, finish

    def wait(self) -> Tensor:
        """Returns the received rows; raises what the exchange raised."""
        self._finish()
        return self._received


class RowExchange(Protocol):
    """A faster uneven all-to-all than the process group's; see row_exchange/communicator.py."""

    def exchange(self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Tensor:
        """Returns the rows [sum(receive_rows), ...] that all members sent here, in group order."""

    def exchange_evenly(self, x: Tensor) -> Tensor:
        """Returns exchange(x) where every member knows that it sends and receives equal parts."""

    def exchange_gathered(
        self, x: Tensor, index: Tensor, divisor: int, send_rows: Sequence[int], receive_rows: Sequence[int]
    ) -> Tensor:
        """Returns exchange(rows), where row r is x[index[r] // divisor]."""

    def start(
        self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], out: Tensor | None = None
    ) -> PendingRows:
        """Starts exchange(); its rows will be in `out` if that is given."""

    def start_gathered(
        self,
        x: Tensor,
        index: Tensor,
        divisor: int,
        send_rows: Sequence[int],
        receive_rows: Sequence[int],
        out: Tensor | None = None,
    ) -> PendingRows:
        """Starts exchange_gathered(); its rows will be in `out` if that is given."""

    def check(self) -> None:
        """Raises if an exchange failed after its rows were given out; see row_exchange/communicator.py."""


class WaitClock:
    """Seconds that this process has waited for other ranks, over all of its groups."""

    def __init__(self) -> None:
        self.seconds = self._since = 0.0

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._since


@dataclass(frozen=True)
class Group:
    """One process group as this rank sees it. Collectives of a group of one return at once.

    Attributes:
        ranks: global ranks of the members, in group order.
        rank: this process's index in `ranks`.
        handle: torch's process group; None where the group has one member.
        exchange: transport of all-to-alls of rows; None for the process group.
        waits: seconds that this rank has waited for others, in all of its groups.
    """

    name: str
    ranks: Sequence[int]
    rank: int
    handle: dist.ProcessGroup | None = None
    exchange: RowExchange | None = None
    waits: WaitClock = field(default_factory=WaitClock, compare=False)

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.ranks)

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduces a tensor over the group in place and returns it."""
        if self.size > 1:
            with self.waits:
                dist.all_reduce(tensor, op=op, group=self.handle)
        return tensor

    def wait(self, work: dist.Work) -> None:
        """Waits for the work that `start_all_reduce` or `start_reduce_scatter` returned."""
        with self.waits:
            work.wait()

    def start_all_reduce(self, tensor: Tensor) -> dist.Work | None:
        """Starts summing a tensor over the group, in place, and returns the work to `wait` for; None in a group of one."""
        return dist.all_reduce(tensor, group=self.handle, async_op=True) if self.size > 1 else None

    def start_reduce_scatter(self, part: Tensor, tensor: Tensor) -> dist.Work | None:
        """Starts summing [size * n, ...] over the group, with this rank's part going into `part`; see
        `start_all_reduce`.
        """
        if self.size == 1:
            part.copy_(tensor)
            return None
        return _reduce_scatter(part, tensor, group=self.handle, async_op=True)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Copies the first member's tensor to all, in place, and returns it."""
        if self.size > 1:
            with self.waits:
                dist.broadcast(tensor, src=self.ranks[0], group=self.handle)
        return tensor

    def all_gather(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns [size * n, ...]: the members' equally shaped [n, ...] tensors along the first dim, in group order.

        Args:
            out: contiguous, of that shape and no part of `tensor`; filled by a group of several members.
        """
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        gathered = tensor.new_empty((self.size * tensor.shape[0], *tensor.shape[1:])) if out is None else out
        with self.waits:
            _all_gather(gathered, tensor, group=self.handle)
        return gathered

    def all_gather_uneven(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        """Returns [sum(sizes), ...]: the members' [n, ...] tensors, whose n are `sizes`, in group order."""
        if self.size == 1 or len(set(sizes)) == 1:
            return self.all_gather(tensor)
        gathered = tensor.new_empty((sum(sizes), *tensor.shape[1:]))
        parts = gathered.split(list(sizes))
        parts[self.rank].copy_(tensor)
        with self.waits:
            works = [
                dist.broadcast(part, src=rank, group=self.handle, async_op=True)
                for part, rank in zip(parts, self.ranks, strict=True)
                if len(part)
            ]
            for work in works:
                work.wait()
        return gathered

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """Returns this rank's part, along the first dim, of the sum of all members' tensors [size * n, ...]."""
        if self.size == 1:
            return tensor
        part = tensor.new_empty((tensor.shape[0] // self.size, *tensor.shape[1:]))
        with self.waits:
            _reduce_scatter(part, tensor.contiguous(), group=self.handle)
        return part

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """Returns [size * n, ...]: the parts that the members' equally shaped [size * n, ...] tensors have for this rank."""
        if self.size == 1:
            return tensor
        received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        with self.waits:
            dist.all_to_all_single(received, tensor.contiguous(), group=self.handle)
        return received

    def all_to_all_uneven(self, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Returns [sum(receive), ...]: what the members' tensors [sum(send), ...] have for this rank, in group order.

        Args:
            send, receive: rows for each member, and from each.
        """
        if self.size == 1:
            return tensor
        received = tensor.new_empty((sum(receive), *tensor.shape[1:]))
        with self.waits:
            dist.all_to_all_single(received, tensor.contiguous(), list(receive), list(send), group=self.handle)
        return received

    def start_shift(self, tensor: Tensor) -> PendingShift:
        """Starts sending a tensor to the next member of the ring of all, and receiving what the one before sends."""
        if self.size == 1:
            return PendingShift(self, tensor, tensor, ())
        received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        sent, ranks, group = tensor.contiguous(), self.ranks, self.handle
        following, previous = ranks[(self.rank + 1) % self.size], ranks[(self.rank - 1) % self.size]
        send, receive = (
            dist.P2POp(dist.isend, sent, following, group),
            dist.P2POp(dist.irecv, received, previous, group),
        )
        return PendingShift(self, received, sent, tuple(dist.batch_isend_irecv([send, receive])))

    def all_gather_object(self, value: object) -> list:
        """Returns the members' values in group order."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        with self.waits:
            dist.all_gather_object(values, value, group=self.handle)
        return values

    def barrier(self) -> None:
        """Waits for all members."""
        if self.size > 1:
            with self.waits:
                dist.barrier(group=self.handle)


@dataclass(frozen=True)
class PendingShift:
    """A tensor on its way round a ring; see `Group.start_shift`. What is sent must not change before the end of `wait`."""

    group: Group
    received: Tensor
    sent: Tensor
    works: tuple[dist.Work, ...]

    def wait(self) -> Tensor:
        """Waits for both directions, and returns what the previous member sent."""
        for work in self.works:
            self.group.wait(work)
        return self.received


@dataclass(frozen=True)
class ParallelState:
    """All groups of this rank, and its device.

    Attributes:
        tp, cp, dp, pp: tensor, context, data and pipeline parallel groups of dense parameters.
        dp_cp: ranks that hold the same slices of dense parameters, and other tokens.
        tp_dp_cp: all ranks of this pipeline stage, for dense parameters with gradients partial over tensor-parallel ranks.
        etp, ep, edp: expert-tensor, expert and expert-data parallel groups.
        etp_edp: data-parallel ranks of expert parameters with gradients that are partial over expert-tensor ranks.
        stage: all ranks of this pipeline stage.
        pool_dp: holders of the same slice of the shared pool, over expert-data-parallel ranks of all stages; etp_pool_dp:
            the same where gradients are partial over expert-tensor ranks.
        embed_dp: the dp_cp ranks of the first and the last pipeline stage, for tied embeddings.
        sequence_parallel: whether hidden states between blocks are split over tensor-parallel ranks along tokens.
        cp_comm_type: what attention exchanges between context-parallel ranks: keys and values round a ring, or heads.
    """

    grid: RankGrid
    rank: int
    device: torch.device
    tp: Group
    cp: Group
    dp: Group
    pp: Group
    dp_cp: Group
    tp_dp_cp: Group
    etp: Group
    ep: Group
    edp: Group
    etp_edp: Group
    stage: Group
    pool_dp: Group
    etp_pool_dp: Group
    embed_dp: Group
    world: Group
    sequence_parallel: bool = False
    cp_comm_type: Literal["p2p", "a2a"] = "p2p"

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.grid.world_size

    def group(self, name: str) -> Group:
        """Returns a group by its name in `rank_grid.GROUPS`."""
        return getattr(self, name)

    @property
    def token_share(self) -> TokenShare:
        """The tokens of a micro-batch that this rank holds between layers."""
        tp = (self.tp.rank, self.tp.size) if self.sequence_parallel else (0, 1)
        return TokenShare((self.cp.rank, self.cp.size), tp)


def single_process_state(device: torch.device | str = "cpu") -> ParallelState:
    """Returns the state of a world of one rank; needs no torch.distributed."""
    groups = {name: Group(name, (0,), 0) for name in GROUPS}
    return ParallelState(RankGrid(1), 0, torch.device(device), **groups)  # type: ignore[arg-type]


def planned_state(
    grid: RankGrid, rank: int, sequence_parallel: bool = False, cp_comm_type: Literal["p2p", "a2a"] = "p2p"
) -> ParallelState:
    """Returns the state of a rank in a world that does not exist: groups have sizes but no process group, and tensors
    no storage.
    """
    groups = {}
    for name in GROUPS:
        size, number = grid.size_and_rank(name, rank)
        groups[name] = Group(name, range(size), number)
    return ParallelState(
        grid, rank, torch.device("meta"), sequence_parallel=sequence_parallel, cp_comm_type=cp_comm_type, **groups
    )


def initialize_model_parallel(
    config: ParallelConfig, device: torch.device | str = "cpu", timeout: timedelta | None = None
) -> ParallelState:
    """Makes the process groups of a layout and returns this rank's parallel state.

    Every rank of the initialized default group must call it. Groups of the same ranks share one process group.

    Args:
        timeout: longest wait in a collective; config.distributed_timeout_minutes if not given.

    Raises:
        ValueError: the sizes do not divide the world.
    """
    if not dist.is_initialized():
        return single_process_state(device)
    grid = RankGrid.of(config, dist.get_world_size())
    rank = dist.get_rank()
    timeout = timeout or timedelta(minutes=config.distributed_timeout_minutes)
    handles: dict[tuple[int, ...], dist.ProcessGroup | None] = {tuple(range(grid.world_size)): dist.group.WORLD}
    groups, waits = {}, WaitClock()
    for name in GROUPS:
        for ranks in grid.groups(name):
            if len(ranks) > 1 and ranks not in handles:
                handles[ranks] = dist.new_group(list(ranks), timeout=connecting_time(grid.world_size, timeout))
                if rank in ranks:
                    dist.distributed_c10d._set_pg_timeout(timeout, handles[ranks])
            if rank in ranks:
                handle = handles[ranks] if len(ranks) > 1 else None
                groups[name] = Group(name, ranks, ranks.index(rank), handle, waits=waits)
    return ParallelState(
        grid,
        rank,
        torch.device(device),
        sequence_parallel=config.sequence_parallel and grid.tp > 1,
        cp_comm_type=config.cp_comm_type,
        **groups,  # type: ignore[arg-type]
    )
