"""The tag of a parameter: its sharding, its initial values and when its gradient is complete, set where it is made.

Gradient groups, de-duplication in norms, checkpoint offsets and layout-independent initial values all follow from the
frozen tag. No other attribute of a parameter says anything about layouts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from megatron_samoe.parallel_state.shard_spec import FlatSlice, ShardSpec, gradient_group_name


@dataclass(frozen=True)
class Init:
    """The initial values of a parameter; `initialize_parameters` applies them when the parameter's global name is
    known.

    Attributes:
        std: of a normal distribution; only with kind "normal".
        mean: of the same distribution; a number, or this rank's shard as a tensor.
        num_indexed_dims: number of leading dims of which every index has its own seed, so that a rank makes only the
            experts it holds.
    """

    kind: Literal["normal", "zeros", "ones"] = "normal"
    std: float = 0.0
    mean: float | Tensor = 0.0
    num_indexed_dims: int = 0


ZEROS, ONES = Init("zeros"), Init("ones")


@dataclass(frozen=True)
class ParameterTag:
    """A parameter's sharding over ranks, its initial values, and when its gradient is complete.

    Attributes:
        shard: which shard of the tensor a rank holds.
        completed_at: when this rank's part of the gradient is complete. backward: after the last micro-batch's backward
            pass. step_end: after all passes of a step, since stages share the parameter or gradients are contracted
            then.
        slice: elements of the shard that this rank holds, where ranks that would hold replicas hold a slice each. The
            gradient of a slice arrives already summed over the group.
        is_routed_expert: whether it is a weight of routed experts, which see only some tokens.
    """

    shard: ShardSpec = field(default_factory=ShardSpec)
    init: Init = ZEROS
    completed_at: Literal["backward", "step_end"] = "backward"
    slice: FlatSlice | None = None
    is_routed_expert: bool = False

    @property
    def gradient_group(self) -> str:
        """Name of the group over which the gradient is summed."""
        return gradient_group_name(self.shard)


def shard_shape(parameter: Tensor) -> tuple[int, ...]:
    """Returns the shape of this rank's shard, also where the rank holds only a slice of it."""
    held = tag_of(parameter).slice
    return tuple(parameter.shape) if held is None else held.shape


def set_tag(parameter: nn.Parameter, tag: ParameterTag) -> nn.Parameter:
    """Tags a parameter and returns it."""
    parameter.tag = tag  # type: ignore[attr-defined]
    return parameter


def tag_of(parameter: Tensor) -> ParameterTag:
    """Returns a parameter's tag. Every parameter of a model has one."""
    tag: ParameterTag | None = getattr(parameter, "tag", None)
    assert tag is not None, (
        f"a parameter {tuple(parameter.shape)} has no tag: tensor_parallel.layers.new_parameter sets it"
    )
    return tag
