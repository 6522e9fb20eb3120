"""Where a rank keeps the pool's banks between steps: whole, or a share of what all holders of copies would repeat.

Every pipeline stage and every expert-data-parallel rank uses the same banks. Copies on all would eat what sharing saves
(16 bytes per bank weight on each), so by default each holds a run of elements with its optimizer state; banks are
gathered when they are combined, and their gradients are reduced and scattered when they are complete.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_samoe.parallel_state.shard_spec import FlatPart, get_flat_part, get_shard_spec, gradient_group_name
from megatron_samoe.parallel_state.state import Group, ParallelState


def share_out(parameter: nn.Parameter, state: ParallelState) -> nn.Parameter:
    """Returns [P, n], the same run of elements of all banks, as a parameter; the whole tensor may be on "meta"."""
    spec = get_shard_spec(parameter)
    part = FlatPart.of_rank(tuple(parameter.shape), state.group(gradient_group_name(spec)), num_whole_dims=1)
    shape = (parameter.shape[0], part.stop - part.start)
    run = nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device=state.device))
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
        num_banks, n = self.shape[0], self._run
        columns = gathered.view(self.group.size, num_banks, n).transpose(0, 1).reshape(num_banks, -1)
        return columns[:, : self.num_elements].reshape(self.shape)

    @contextmanager
    def gradient(self) -> Iterator[Tensor]:
        """Gives a tensor to add this rank's whole gradient to; on leaving it is in the main gradient.

        A shared-out bank's gradient is then already summed over the group, whose ranks call it together.
        """
        main_grad: Tensor = self.parameter.main_grad  # type: ignore[attr-defined]
        if self.part is None:
            yield main_grad
            return
        num_banks, n = self.shape[0], self._run
        columns = main_grad.new_zeros(num_banks, self.group.size * n)
        whole = main_grad.new_zeros(self.shape)
        yield whole
        columns[:, : self.num_elements] = whole.view(num_banks, -1)
        by_member = columns.view(num_banks, self.group.size, n).transpose(0, 1).reshape(-1, n)
        main_grad += self.group.reduce_scatter(by_member)[:, : main_grad.shape[1]]

    @property
    def num_elements(self) -> int:
        """Elements of one bank on this rank's experts."""
        return math.prod(self.shape[1:])

    def columns(self, member: int) -> slice:
        """Returns the run of a bank's elements that a member of the group holds."""
        return slice(min(member * self._run, self.num_elements), min((member + 1) * self._run, self.num_elements))

    @property
    def _run(self) -> int:
        return -(-self.num_elements // self.group.size)

    def _padded(self, run: Tensor) -> Tensor:
        missing = self._run - run.shape[1]
        return torch.cat((run, run.new_zeros(run.shape[0], missing)), dim=1) if missing else run
