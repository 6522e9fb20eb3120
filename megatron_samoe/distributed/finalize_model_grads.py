"""The completion of gradients after a step's backward passes: each becomes that of the global batch, once."""

from __future__ import annotations

from typing import Protocol

from megatron_samoe.distributed.grad_buffer import GradBuffers


class StepModel(Protocol):
    """A model with gradients that are completed only at the end of a step."""

    def finish_step(self) -> None:
        """Adds this rank's gradients of banks and coefficients, which backward hooks cannot add (moe/sharing)."""


def finalize_model_grads(model: StepModel, buffers: GradBuffers, gradient_scale: float = 1.0) -> None:
    """Completes the model's gradients, sums all gradients over their groups and divides by the loss scale.

    Call it exactly once per optimizer step, after the last backward pass.
    """
    model.finish_step()
    buffers.reduce()
    if gradient_scale != 1.0:
        buffers.scale(1.0 / gradient_scale)
