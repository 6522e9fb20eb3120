"""Warnings of a step that went wrong."""

from __future__ import annotations

from megatron_samoe.log import logger
from megatron_samoe.training.hook import Hook, Training
from megatron_samoe.training.train_step import StepResult


class StepWarnings(Hook):
    """Names the samples of a spike, and steps that were skipped."""

    rank_0_only = True

    def post_step(self, run: Training, result: StepResult) -> None:
        first = run.state.consumed_samples - result.batch_size
        if result.spike is not None:
            logger.info(
                f"iteration {run.state.iteration}: {result.spike}; samples {first} to {run.state.consumed_samples - 1} of the "
                f"training data{'; the step was skipped' if result.skipped else ''}"
            )
        elif result.skipped:
            logger.info(f"gradient overflow at loss scale {result.loss_scale}: the step was skipped")
