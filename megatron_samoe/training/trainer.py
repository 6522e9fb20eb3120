"""The training loop: step, record, save, exit. Hooks do everything else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_samoe.dist_checkpointing.saving import BackgroundSaver
from megatron_samoe.dist_checkpointing.store import newest_in_words
from megatron_samoe.errors import CheckpointError, MegatronSamoeError
from megatron_samoe.log import logger
from megatron_samoe.training.batches import RunData
from megatron_samoe.training.checkpointing import save_run
from megatron_samoe.training.evaluate import evaluate_run
from megatron_samoe.training.hang_watch import HangWatch
from megatron_samoe.training.hook import Hook, refuse_strange
from megatron_samoe.training.metrics import make_record
from megatron_samoe.training.micro_batches import Batch
from megatron_samoe.training.non_finite import raise_non_finite
from megatron_samoe.training.resume import resume
from megatron_samoe.training.save_folder import DiskRoom, owned_folder
from megatron_samoe.training.setup import TrainSetup, initial_state
from megatron_samoe.training.state import TrainState
from megatron_samoe.training.train_step import StepResult, Stopwatch, named_range, train_step


class Trainer:
    """Trains from the newest checkpoint, or from the start, to --train-iters or an earlier exit.

    Args:
        hooks: called in this order on every rank, those of rank 0 only there.
    """

    def __init__(self, setup: TrainSetup, data: RunData, hooks: Sequence[Hook]):
        self.setup, self.data, self.config, parallel = setup, data, setup.config, setup.parallel
        refuse_strange(hooks)
        self.hooks = [hook for hook in hooks if parallel.rank == 0 or not hook.rank_0_only]
        self._asked = [hook for hook in hooks if not hook.rank_0_only]
        self.state = initial_state(setup)
        self.stopwatch = Stopwatch(parallel.world.waits)
        limit = timedelta(minutes=self.config.parallel.distributed_timeout_minutes)
        self.watch = HangWatch.of(self.config, parallel.rank)
        self.saver = BackgroundSaver(parallel, limit) if self.config.checkpoint.async_save else None
        self._began, self._saved_at = time.monotonic(), -1

    def run(self) -> TrainState:
        """Trains and returns the last state; it has been saved if the run has a folder.

        Raises:
            CheckpointError: another run writes to the same folder, or it cannot be written to.
            CommunicationError: another rank died or hung.
        """
        config, parallel = self.config, self.setup.parallel
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.watch.naming_lost_ranks(parallel, config.checkpoint.save))
            stack.enter_context(owned_folder(config, parallel))
            for hook in self.hooks:
                stack.enter_context(hook.around(self))
            self._load()
            try:
                self._notify(lambda hook: hook.start(self))
                self._evaluate_only() if config.training.skip_train else self._train()
            finally:
                self._leave()
        return self.state

    def _load(self) -> None:
        """Resumes from the checkpoint that there is, if any."""
        self.watch.begin("loading")
        self.setup, self.state = resume(self.setup, self.state)
        if self.config.checkpoint.load == self.config.checkpoint.save:
            self._saved_at = self.state.iteration

    def _evaluate_only(self) -> None:
        record = {"iteration": self.state.iteration, **evaluate_run(self, with_test=True)}
        self._notify(lambda hook: hook.evaluated(self, record))

    def _train(self) -> None:
        last, reason = self.config.training.train_iters, None
        if self.state.iteration >= last:
            logger.info(
                f"the run is at iteration {self.state.iteration}, and --train-iters is {last}: nothing to train; a larger one trains on"
            )
        room = self._room(last)
        batches = self.data.train_batches(self.state.consumed_samples)
        while reason is None and self.state.iteration < last:
            self._step(next(batches))
            reason = self._exit_reason()
            if reason is None and self._is_due(self.config.checkpoint.save_interval):
                self._save(room)
        self._save()
        self._finish_saving()
        if reason is not None:
            logger.info(f"exiting after iteration {self.state.iteration}: {reason}")
            if self.state.iteration < last:
                self._notify(lambda hook: hook.exited(self))

    def _room(self, last: int) -> DiskRoom | None:
        """Returns what looks for the room of checkpoints to come, after a first look; None where none come."""
        if self.config.checkpoint.save is None or self.state.iteration >= last:
            return None
        parallel = self.setup.parallel if self.saver is None else self.saver.parallel
        room = DiskRoom(self.setup, self.state, parallel)
        room.look_ahead(self.state.iteration)
        return room

    def _step(self, batches: list[Batch]) -> None:
        setup, number = self.setup, self.state.iteration + 1
        self.watch.begin(f"computing iteration {number}")
        self._notify(lambda hook: hook.pre_step(self, batches))
        wants_gradients = any([hook.wants_gradients(self) for hook in self._asked])
        self.stopwatch.begin()
        backward_done = partial(self._notify, lambda hook: hook.backward_done(self)) if wants_gradients else None
        with named_range(f"iteration {number}", setup.parallel.device):
            result, state = train_step(setup, self.state, batches, backward_done, self._pre_optim_step)
        if not result.is_finite:
            raise_non_finite(setup, self.state, batches, result)
        self.stopwatch.end(state.consumed_tokens - self.state.consumed_tokens)
        self.state = state
        self._let_teacher_go()
        self._notify(lambda hook: hook.post_step(self, result))
        self._record(result)

    def _let_teacher_go(self) -> None:
        """Frees the teacher after its last step."""
        if self.setup.teacher is not None and not self.config.distillation.teaches_after(self.state.iteration):
            self.setup = replace(self.setup, teacher=None)
            logger.info(f"--teacher-until {self.state.iteration}: the student continues without its teacher")

    def _pre_optim_step(self, grad_norm: float) -> None:
        self._notify(lambda hook: hook.pre_optim_step(self, grad_norm))

    def _record(self, result: StepResult) -> None:
        is_last = self.state.iteration == self.config.training.train_iters
        wanted = any([hook.wants_record(self) for hook in self._asked])
        if not (wanted or is_last or self._is_due(self.config.logging.log_interval)):
            return
        record = make_record(self.setup, self.state, result, self.stopwatch.take(), self.data.epoch_samples)
        self._notify(lambda hook: hook.contribute(self, result, record))
        self._notify(lambda hook: hook.record(self, record))

    def _exit_reason(self) -> str | None:
        """Returns why to end now, the same on all ranks; None to continue.

        Raises:
            CheckpointError: a save in the background has failed.
        """
        training = self.config.training
        if self._is_due(training.exit_interval):
            return f"--exit-interval {training.exit_interval}"
        minutes = (time.monotonic() - self._began) / 60
        late = training.exit_duration_in_mins is not None and minutes >= training.exit_duration_in_mins
        unsaved = self.saver is not None and self.saver.has_failed
        wishes = [unsaved, *(hook.wants_exit(self) for hook in self._asked), late]
        own = torch.tensor(wishes, dtype=torch.int32, device=self.setup.parallel.device)
        is_unsaved, *numbers, is_late = self.setup.parallel.world.all_reduce(own, dist.ReduceOp.MAX).tolist()
        if is_unsaved:
            self._finish_saving()  # raises the errors of saving on every rank
        for hook, number in zip(self._asked, numbers, strict=True):
            if number:
                return hook.exit_reason(self, number)
        return f"--exit-duration-in-mins {training.exit_duration_in_mins}" if is_late else None

    def _save(self, room: DiskRoom | None = None) -> None:
        """Saves a checkpoint, if the run has a folder without one of this state.

        Args:
            room: looks whether the next one will have room too.
        """
        if self.config.checkpoint.save is None or self._saved_at == self.state.iteration:
            return
        self.watch.begin(f"saving iteration {self.state.iteration}")
        save_run(self.setup, self.state, self.saver, partial(self._saved, room, self.state.iteration))
        self._saved_at = self.state.iteration

    def _saved(self, room: DiskRoom | None, iteration: int, path: Path) -> None:
        self._notify(lambda hook: hook.checkpoint_saved(self, path))
        if room is not None:
            room.look(iteration)

    def _finish_saving(self, timeout_s: float | None = None) -> None:
        if self.saver is not None:
            self.saver.wait(timeout_s)

    def _leave(self) -> None:
        with contextlib.suppress(CheckpointError):  # it has been logged
            self._finish_saving(timeout_s=60)
        for hook in self.hooks:
            with contextlib.suppress(OSError):
                hook.close(self)

    def _is_due(self, interval: int | None) -> bool:
        return interval is not None and self.state.iteration % interval == 0

    def _notify(self, message: Callable[[Hook], None]) -> None:
        for hook in self.hooks:
            try:
                message(hook)
            except OSError as error:
                raise MegatronSamoeError(
                    f"{hook.place} cannot be written: {error}. {newest_in_words(self.config.checkpoint.save)}"
                ) from error
