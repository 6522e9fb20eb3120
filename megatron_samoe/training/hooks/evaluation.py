"""Evaluation while a run trains (--eval-interval)."""

from __future__ import annotations

from megatron_samoe.training.evaluate import evaluate_run
from megatron_samoe.training.hook import Hook, Record, Training
from megatron_samoe.training.train_step import StepResult


class Evaluation(Hook):
    """Evaluates every --eval-interval steps, and after the last on test data as well."""

    def wants_record(self, run: Training) -> bool:
        """Whether an evaluation is due."""
        training = run.setup.config.training
        return run.state.iteration == training.train_iters or run.state.iteration % training.eval_interval == 0

    def contribute(self, run: Training, result: StepResult, record: Record) -> None:
        if self.wants_record(run):
            record |= evaluate_run(run, with_test=run.state.iteration == run.setup.config.training.train_iters)
