"""Update algorithms other than AdamW, one for each group of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_samoe.distributed.grad_buffer import Piece
from megatron_samoe.optimizer.whole_tensors import WholeTensors


class Update(Protocol):
    """An update algorithm: master -= lr * (direction(accumulate(gradient)) + weight_decay * master).

    Attributes:
        moments: names of the state of each element; checkpoints carry it.
        needs_whole: whether `direction` needs full tensors; see `whole_tensors`.
    """

    moments: Sequence[str]
    needs_whole: bool

    def accumulate(self, grad: Tensor, moments: Mapping[str, Tensor], step: int) -> Tensor:
        """Adds the gradient of the elements that this rank updates to the moments, and returns their step before
        `direction`. All have the shape of the elements.

        Args:
            grad: fp32, clipped; read-only.
            moments: by name; updated in place.
            step: number of the step, 1 for the first.
        """

    def direction(self, step: Tensor, num_stacked: int) -> Tensor:
        """Returns the direction of the update; lr * direction is subtracted from the master weights.

        Args:
            step: result of `accumulate`: with `needs_whole` a stack of full tensors (experts and banks are stacks
                themselves), else this rank's elements. The result has its shape.
            num_stacked: number of leading dims that only count tensors: 1 with `needs_whole`, else 0.
        """


@torch.no_grad()
def apply_update(
    update: Update,
    full: WholeTensors | None,
    pieces: Mapping[str, Piece],
    masters: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[str, Tensor]],
    rates: tuple[float, float, float],
    step: int,
) -> None:
    """Updates the master weights of a group's parameters. Ranks call it together, also those that hold no element of
    some tensor.

    Args:
        full: brings full tensors of the group's parameters to an update that needs them.
        pieces: of the group's parameters.
        rates: learning rate, weight decay, factor on the gradients.
    """
    lr, weight_decay, grad_scale = rates

    def step_of(name: str) -> Tensor:
        grad = pieces[name].grad.to(masters[name].dtype) * grad_scale
        return update.accumulate(grad, moments[name], step)

    directions = (
        ((name, update.direction(step_of(name), 0)) for name in pieces)
        if full is None
        else full.directions(lambda x: update.direction(x, 1), step_of)
    )
    for name, direction in directions:
        master = masters[name]
        master.mul_(1.0 - lr * weight_decay).sub_(direction.reshape(master.shape), alpha=lr)
