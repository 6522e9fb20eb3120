"""Main gradients: flat fp32 buffers, one per group of ranks over which gradients are summed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_samoe.parallel_state.shard_spec import get_shard_spec, gradient_group_name
from megatron_samoe.parallel_state.state import Group, ParallelState


class GradBuffer:
    """The gradients of parameters that are summed over the same ranks, in one tensor.

    Each parameter gets `main_grad`, a view into the buffer. What autograd leaves in `grad` is added to it as soon as it
    is complete and freed; ops that know main gradients (experts) add to them directly.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], group: Group):
        self.group = group
        self.parameters = dict(parameters)
        first = next(iter(parameters.values()))
        dtype = torch.promote_types(first.dtype, torch.float32)
        self.flat = torch.zeros(sum(p.numel() for p in parameters.values()), dtype=dtype, device=first.device)
        start = 0
        for p in parameters.values():
            p.main_grad = self.flat[start : start + p.numel()].view(p.shape)  # type: ignore[attr-defined]
            start += p.numel()
            p.register_post_accumulate_grad_hook(_move_to_main_grad)


def _move_to_main_grad(parameter: Tensor) -> None:
    if parameter.grad is None:
        return  # an op has added to the main gradient itself
    parameter.main_grad += parameter.grad  # type: ignore[attr-defined]
    parameter.grad = None


class GradBuffers:
    """All main gradients of a rank's model.

    Args:
        parameters: by global name; those without requires_grad are left out.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], state: ParallelState):
        self.state = state
        by_group: dict[tuple[str, torch.dtype], dict[str, nn.Parameter]] = {}
        for name, p in parameters.items():
            if p.requires_grad:
                dtype = torch.promote_types(p.dtype, torch.float32)
                by_group.setdefault((gradient_group_name(get_shard_spec(p)), dtype), {})[name] = p
        self.buffers = [GradBuffer(members, state.group(name)) for (name, _), members in by_group.items()]
        self.parameters = {name: p for buffer in self.buffers for name, p in buffer.parameters.items()}

    def zero(self) -> None:
        """Clears all gradients."""
        for buffer in self.buffers:
            buffer.flat.zero_()

    def reduce(self) -> None:
        """Sums each buffer over its group. Losses are divided by global token counts, so no averaging follows."""
        for buffer in self.buffers:
            buffer.group.all_reduce(buffer.flat)

    def scale(self, factor: float) -> None:
        """Multiplies all gradients."""
        for buffer in self.buffers:
            buffer.flat.mul_(factor)
