"""How a rank keeps the pool's banks between steps, unsharded or as a slice, and who sums their gradients.

A gradient is summed over layers and micro-batches by the way's lender (`finish_step`), and over ranks here, by
`bank_exchange.py` where banks outnumber a stage's layers, or by `distributed/grad_buffer.py` where ranks hold all of every bank.

Every pipeline stage and every expert-data-parallel rank uses the same banks. Copies on all of them would lose what
sharing saves (16 bytes per bank weight on each). So by default each rank holds a slice with its optimizer state. Banks
are gathered when they are combined, and their gradients are reduce-scattered over the bank's group when they are complete.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_samoe.parallel_state.parameter_tag import set_tag, tag_of
from megatron_samoe.parallel_state.shard_spec import FlatSlice
from megatron_samoe.parallel_state.state import Group, ParallelState


def shard_bank(parameter: nn.Parameter, state: ParallelState) -> nn.Parameter:
    """Returns [P, n], this rank's slice of every bank, as a parameter; the unsharded tensor may be on "meta"."""
    tag = tag_of(parameter)
    held = FlatSlice.of_rank(tuple(parameter.shape), state.group(tag.gradient_group), num_leading_dims=1)
    shape = (parameter.shape[0], held.stop - held.start)
    slices = nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device=state.device))
    return set_tag(slices, replace(tag, slice=held))


def meta_state(state: ParallelState) -> ParallelState:
    """Returns the state with parameters made without storage."""
    return replace(state, device=torch.device("meta"))


class BankStore:
    """Lends unsharded banks and takes in their gradients, however they are kept."""

    def __init__(self, parameter: nn.Parameter, state: ParallelState):
        self.parameter = parameter
        tag = tag_of(parameter)
        self.slice = tag.slice
        self.group: Group = state.group(tag.gradient_group)

    @property
    def shape(self) -> tuple[int, ...]:
        """[P, e, ...], of this rank's experts."""
        return self.slice.shape if self.slice is not None else tuple(self.parameter.shape)

    @torch.no_grad()
    def unsharded(self) -> Tensor:
        """Returns this weight of all banks, [P, e, ...]: the parameter itself, or gathered from the slices of the group's ranks, which
        call it together."""
        if self.slice is None:
            return self.parameter.detach()
        gathered = _all_gather(self.group, self._padded(self.parameter.detach()))
        num_banks, slice_size = self.shape[0], self._slice_size
        banks_PN = gathered.view(self.group.size, num_banks, slice_size).transpose(0, 1).reshape(num_banks, -1)
        return banks_PN[:, : self.num_elements].reshape(self.shape)

    @contextmanager
    def gradient(self) -> Iterator[Tensor]:
        """Gives a tensor to add this rank's gradient of all elements to; on leaving it is in the main gradient.

        A sharded bank's gradient is then already summed over the group, whose ranks call it together.
        """
        main_grad: Tensor = self.parameter.main_grad  # type: ignore[attr-defined]
        if self.slice is None:
            yield main_grad
            return
        gradient = main_grad.new_zeros(self.shape)
        yield gradient
        self.add_gradient(gradient)

    def add_gradient(self, gradient: Tensor) -> None:
        """Adds the ranks' gradients [P, e, ...] to the slices' main gradients; ranks of the group call it together."""
        main_grad: Tensor = self.parameter.main_grad  # type: ignore[attr-defined]
        num_banks, slice_size = self.shape[0], self._slice_size
        columns = main_grad.new_zeros(num_banks, self.group.size * slice_size)
        columns[:, : self.num_elements] = gradient.view(num_banks, -1)
        by_member = columns.view(num_banks, self.group.size, slice_size).transpose(0, 1).reshape(-1, slice_size)
        main_grad += _reduce_scatter(self.group, by_member)[:, : main_grad.shape[1]]

    @property
    def num_elements(self) -> int:
        """Elements of one bank on this rank's experts."""
        return math.prod(self.shape[1:])

    def columns(self, member: int) -> slice:
        """Returns which of a bank's elements a member of the group holds."""
        return slice(
            min(member * self._slice_size, self.num_elements), min((member + 1) * self._slice_size, self.num_elements)
        )

    @property
    def numel(self) -> int:
        """Elements of all banks on this rank's experts, also where it holds a slice of them only."""
        return self.shape[0] * self.num_elements

    @property
    def held(self) -> int:
        """Elements of the longest slice that a holder has."""
        return self.shape[0] * self._slice_size

    @property
    def _slice_size(self) -> int:
        return -(-self.num_elements // self.group.size)

    def _padded(self, held: Tensor) -> Tensor:
        missing = self._slice_size - held.shape[1]
        return torch.cat((held, held.new_zeros(held.shape[0], missing)), dim=1) if missing else held


def _all_gather(group: Group, x_Pn: Tensor) -> Tensor:
    """Returns `group.all_gather`, through the group's own transport where it has one."""
    if group.exchange is None:
        return group.all_gather(x_Pn)
    return group.exchange.exchange_evenly(x_Pn.repeat(group.size, 1))


def _reduce_scatter(group: Group, x: Tensor) -> Tensor:
    """Returns `group.reduce_scatter` of [size * P, n], likewise; parts are added in the group's order."""
    if group.exchange is None:
        return group.reduce_scatter(x)
    return group.exchange.exchange_evenly(x).view(group.size, -1, x.shape[1]).sum(0)
