"""What a parameter is, globally: one frozen tag from which everything distributed about it is derived.

Gradient groups, de-duplication in norms, checkpoint offsets and layout-independent initial values all follow from the
tag, so that no other attribute of a parameter says anything about layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from megatron_samoe.parallel_state.rank_grid import GROUPS
from megatron_samoe.parallel_state.state import ParallelState


@dataclass(frozen=True)
class ShardSpec:
    """How one parameter lies over the ranks.

    Attributes:
        family: dense parameters live on the dense grid, expert and pool parameters on the expert grid; the pool is
            shared by all pipeline stages besides.
        partition: (tensor dim, axis) pairs: the dim is split in equal, consecutive parts over the axis. Over all other
            axes of its grid the parameter is a replica.
        partial: axes of replicas whose gradients are parts of a sum rather than equal.
    """

    family: Literal["dense", "expert", "pool"] = "dense"
    partition: tuple[tuple[int, str], ...] = ()
    partial: tuple[str, ...] = ()

    @property
    def gradient_axes(self) -> tuple[str, ...]:
        """Axes over which gradients are summed: those with different data, and those with partial sums.

        Losses are divided by the token count of the global batch, so that data-parallel gradients are summed too.
        """
        data = {"dense": ("dp",), "expert": ("edp",), "pool": ("edp", "pp")}[self.family]
        return tuple(sorted({*data, *self.partial}))

    def global_shape(self, local_shape: torch.Size | tuple[int, ...], state: ParallelState) -> tuple[int, ...]:
        """Returns the whole tensor's shape."""
        shape = list(local_shape)
        for dim, axis in self.partition:
            shape[dim] *= state.group(axis).size
        return tuple(shape)

    def offsets(self, local_shape: torch.Size | tuple[int, ...], state: ParallelState) -> tuple[int, ...]:
        """Returns where this rank's part begins in the whole tensor."""
        start = [0] * len(local_shape)
        for dim, axis in self.partition:
            start[dim] = local_shape[dim] * state.group(axis).rank
        return tuple(start)

    def local_slice(self, whole: Tensor, state: ParallelState) -> Tensor:
        """Returns this rank's part of a whole tensor, as a view."""
        for dim, axis in self.partition:
            group = state.group(axis)
            whole = whole.chunk(group.size, dim)[group.rank]
        return whole

    def is_first_replica(self, state: ParallelState) -> bool:
        """Whether this rank stands for its part: exactly one rank of each set of replicas does.

        Pipeline stages hold different dense and expert parameters, but the same pool.
        """
        split = {axis for _, axis in self.partition}
        own_grid = "dense" if self.family == "dense" else "expert"
        axes = set(state.grid.axes(own_grid)) - split
        if self.family != "pool":
            axes.discard("pp")
        return all(state.group(axis).rank == 0 for axis in axes)


def gradient_group_name(spec: ShardSpec) -> str:
    """Returns the named group over which a parameter's gradient is summed."""
    for name, (_, axes) in GROUPS.items():
        if tuple(sorted(axes)) == spec.gradient_axes:
            return name
    raise AssertionError(f"no process group spans {spec.gradient_axes}")


def set_shard_spec(parameter: nn.Parameter, spec: ShardSpec) -> nn.Parameter:
    """Tags a parameter and returns it."""
    parameter.shard_spec = spec  # type: ignore[attr-defined]
    return parameter


def get_shard_spec(parameter: Tensor) -> ShardSpec:
    """Returns a parameter's tag; every parameter of a model has one."""
    return parameter.shard_spec  # type: ignore[attr-defined]
