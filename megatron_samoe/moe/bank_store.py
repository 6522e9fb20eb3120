"""Where a rank keeps the pool's banks between steps: whole, or a share of what all holders of copies would repeat.

Every pipeline stage and every expert-data-parallel rank uses the same banks. Copies on all would eat what sharing saves
(16 bytes per bank weight on each), so by default each holds a run of elements with its optimizer state; banks are
gathered when they are combined, and their gradients are reduced and scattered when they are complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_samoe.parallel_state.shard_spec import FlatPart, get_flat_part, get_shard_spec, gradient_group_name
from megatron_samoe.parallel_state.state import Group, ParallelState


def share_out(parameter: nn.Parameter, state: ParallelState) -> nn.Parameter:
    """Returns the run of a bank's elements that this rank holds, as a parameter; the bank itself may be on "meta"."""
    spec = get_shard_spec(parameter)
    part = FlatPart.of_rank(tuple(parameter.shape), state.group(gradient_group_name(spec)))
    run = nn.Parameter(torch.empty(part.stop - part.start, dtype=parameter.dtype, device=state.device))
    run.shard_spec, run.flat_part, run.init = spec, part, parameter.init  # type: ignore[attr-defined]
    return run


def meta_state(state: ParallelState) -> ParallelState:
    """Returns the state with parameters made without storage."""
    return replace(state, device=torch.device("meta"))


class BankStore:
    """Lends whole banks and takes in their gradients, however they are kept."""

    def __init__(self, parameter: nn.Parameter, state: ParallelState):
        self.parameter = parameter
        self.part = get_flat_part(parameter)
        self.group: Group = state.group(gradient_group_name(get_shard_spec(parameter)))

    @property
    def shape(self) -> tuple[int, ...]:
        """[P, e, ...], of this rank's experts."""
        return self.part.shape if self.part is not None else tuple(self.parameter.shape)

    @torch.no_grad()
    def whole(self) -> Tensor:
        """Returns the bank; ranks of the group call it together."""
        if self.part is None:
            return self.parameter.detach()
        gathered = self.group.all_gather(self._padded(self.parameter.detach()))
        return gathered[: self._numel].view(self.part.shape)

    @contextmanager
    def gradient(self) -> Iterator[Tensor]:
        """Gives a tensor to add this rank's whole gradient to; on leaving it is in the main gradient.

        A shared-out bank's gradient is then already summed over the group, whose ranks call it together.
        """
        main_grad: Tensor = self.parameter.main_grad  # type: ignore[attr-defined]
        if self.part is None:
            yield main_grad
            return
        flat = main_grad.new_zeros(self._run * self.group.size)
        yield flat[: self._numel].view(self.part.shape)
        main_grad += self.group.reduce_scatter(flat)[: main_grad.numel()]

    @property
    def _numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def _run(self) -> int:
        return -(-self._numel // self.group.size)

    def _padded(self, run: Tensor) -> Tensor:
        missing = self._run - run.numel()
        return torch.cat((run, run.new_zeros(missing))) if missing else run
