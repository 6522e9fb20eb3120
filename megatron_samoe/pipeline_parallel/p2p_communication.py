"""Asynchronous sends of activations to the next stage and gradients to the previous one, of known shape, with time-outs
that name what was awaited.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_samoe.errors import CommunicationError
from megatron_samoe.parallel_state.state import ParallelState

Direction = Literal["forward", "backward"]
WRAP_SUFFIX = " wrap"


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype and device of the tensors that stages exchange.

    Attributes:
        rows_without_gradient: last rows of an activation that have no gradient: its gradient's message ends before them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    rows_without_gradient: int = 0

    def of_gradients(self) -> TensorSpec:
        """Returns what comes back."""
        rows, *rest = self.shape
        return TensorSpec((rows - self.rows_without_gradient, *rest), self.dtype, self.device)

    def empty(self) -> Tensor:
        """Returns a tensor to receive into."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


@dataclass
class _Pending:
    work: dist.Work
    tensor: Tensor
    what: str


@dataclass
class PipelineChannel:
    """This rank's connections to its neighbours.

    Each direction has its own process groups, and so has the way from the last rank back to the first that virtual
    stages need. Both ends of a group post their operations in the same order, so none can block another.

    Args:
        groups: process groups by direction, maybe with WRAP_SUFFIX; see `parallel_state.state.pipeline_channels`.
    """

    parallel: ParallelState
    groups: dict[str, dist.ProcessGroup]
    timeout: timedelta
    _sends: list[_Pending] = field(default_factory=list)
    _receives: dict[str, _Pending] = field(default_factory=dict)

    def send(self, tensor: Tensor, direction: Direction, what: str) -> None:
        """Starts sending to the neighbour and returns; `finish` waits for all sends."""
        peer, group = self._route(direction, sending=True)
        tensor = tensor.contiguous()
        self._sends = [p for p in self._sends if not p.work.is_completed()]
        work = dist.isend(tensor, peer, group=group)
        assert work is not None, "both ranks are in the group"
        self._sends.append(_Pending(work, tensor, f"{what} to rank {peer}"))

    def post_receive(self, spec: TensorSpec, direction: Direction, what: str) -> None:
        """Starts receiving `what` from the neighbour; call it once for each."""
        if what not in self._receives:
            peer, group = self._route(direction, sending=False)
            tensor = spec.empty()
            work = dist.irecv(tensor, peer, group=group)
            assert work is not None, "both ranks are in the group"
            self._receives[what] = _Pending(work, tensor, f"{what} from rank {peer}")

    def take(self, what: str) -> Tensor:
        """Waits for a posted receive and returns its tensor; CommunicationError where it does not come within
        `timeout`.
        """
        pending = self._receives.pop(what)
        self._wait(pending)
        return pending.tensor

    def finish(self) -> None:
        """Waits until the neighbours have received everything sent; CommunicationError where they do not within
        `timeout`.
        """
        for pending in self._sends:
            self._wait(pending)
        self._sends.clear()

    def _wait(self, pending: _Pending) -> None:
        pp = self.parallel.pp
        began = time.monotonic()
        try:
            with pp.waits:
                pending.work.wait(self.timeout)
        except RuntimeError as error:
            waited = time.monotonic() - began
            in_vain = waited >= 0.9 * self.timeout.total_seconds()
            said = (
                f"waited {waited:.0f} s and never got the" if in_vain else "lost its connection while it waited for the"
            )
            raise CommunicationError(
                f"Pipeline stage {pp.rank} of {pp.size} (rank {self.parallel.rank}) {said} {pending.what}: "
                f"{str(error).splitlines()[0]}"
            ) from error

    def _route(self, direction: Direction, sending: bool) -> tuple[int, dist.ProcessGroup]:
        pp = self.parallel.pp
        step = 1 if (direction == "forward") == sending else -1
        position = pp.rank + step
        wraps = not 0 <= position < pp.size
        return pp.ranks[position % pp.size], self.groups[direction + (WRAP_SUFFIX if wraps else "")]


def open_channel(parallel: ParallelState, timeout: timedelta) -> PipelineChannel | None:
    """Returns this rank's channel, or None in a pipeline of one stage; all ranks call it together."""
    if parallel.pp.size == 1:
        return None
    groups = {}
    for direction in ("forward", "backward", "forward" + WRAP_SUFFIX, "backward" + WRAP_SUFFIX):
        for ranks in parallel.grid.groups("pp"):
            handle = dist.new_group(list(ranks), timeout=timeout)
            if parallel.rank in ranks:
                groups[direction] = handle
    return PipelineChannel(parallel, groups, timeout)
