"""The interface of hooks: a hook is called at points of every step, on every rank, with the run in hand."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from megatron_samoe.moved import names_moved
from megatron_samoe.training.batches import RunData
from megatron_samoe.training.hang_watch import HangWatch
from megatron_samoe.training.micro_batches import Batch
from megatron_samoe.training.setup import TrainSetup
from megatron_samoe.training.state import TrainState
from megatron_samoe.training.train_step import StepResult

Record = dict[str, Any]


class Training(Protocol):
    """A run under way as hooks see it: the trainer.

    Attributes:
        state: of the last step that is done.
        watch: to be notified of work that may take long.
    """

    setup: TrainSetup
    data: RunData
    state: TrainState
    watch: HangWatch


class Hook:
    """Every method may be left as it is. All ranks call the same methods in the same order, so hooks may communicate."""

    #: What it writes to, for messages.
    place = "the console"
    #: Whether it runs on rank 0 only. Then it may not communicate, and is not asked for what it wants.
    rank_0_only: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Raises TypeError where a method's name is nearly that of a point: it would never be called."""
        points = [name for name in vars(Hook) if not name.startswith("_")]
        for name in set(vars(cls)) - set(points):
            close = difflib.get_close_matches(name, points, n=1, cutoff=0.8)
            if close and callable(vars(cls)[name]) and not name.startswith("_"):
                raise TypeError(
                    f"{cls.__name__}.{name} is not one of a hook's points and would never be called; is it {close[0]}?"
                )

    def around(self, run: Training) -> contextlib.AbstractContextManager[None]:
        """Returns a context around the run, from before a checkpoint is loaded until all hooks are closed."""
        return contextlib.nullcontext()

    def start(self, run: Training) -> None:
        """Training begins, or resumes; nothing of it has happened yet."""

    def pre_step(self, run: Training, batches: Sequence[Batch]) -> None:
        """A step begins, on these micro-batches of this rank."""

    def wants_gradients(self, run: Training) -> bool:
        """Whether `backward_done` is to see this step's gradients before any of them is reduced; the same on all ranks."""
        return False

    def backward_done(self, run: Training) -> None:
        """The last backward pass is over; main gradients are this rank's, where a hook wanted them."""

    def pre_optim_step(self, run: Training, grad_norm: float) -> None:
        """Gradients are those of the global batch; the optimizer has not used them yet."""

    def post_step(self, run: Training, result: StepResult) -> None:
        """A step is done."""

    def wants_record(self, run: Training) -> bool:
        """Whether the step that is done is to be recorded, in addition to every --log-interval steps and the last; the same on all
        ranks."""
        return False

    def contribute(self, run: Training, result: StepResult, record: Record) -> None:
        """A step is recorded: the hook may add to the record."""

    def record(self, run: Training, record: Record) -> None:
        """The record of a step is complete."""

    def evaluated(self, run: Training, record: Record) -> None:
        """A checkpoint was evaluated without training."""

    def wants_exit(self, run: Training) -> int:
        """Whether a run is to be saved and end after the step that is done: 0, or a number that says why. Ranks may differ;
        the largest number counts."""
        return 0

    def exit_reason(self, run: Training, number: int) -> str:
        """Returns in words why the run ends; all ranks call it with the same number, which some rank's `wants_exit` gave."""
        return f"{type(self).__name__} ({number})"

    def exited(self, run: Training) -> None:
        """The run has ended before its last step, and is saved."""

    def checkpoint_saved(self, run: Training, path: Path) -> None:
        """A checkpoint is complete; called on rank 0, from another thread with --async-save."""

    def close(self, run: Training) -> None:
        """Training ends, for whatever reason."""


def refuse_strange(hooks: Sequence[Hook]) -> None:
    """Raises TypeError naming the first object that is not a hook."""
    for hook in hooks:
        if not isinstance(hook, Hook):
            raise TypeError(f"{hook!r} is not a Hook: give an instance of a class derived from training.hook.Hook")


__getattr__ = names_moved(__name__, {"Run": Training})
