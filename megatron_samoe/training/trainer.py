"""The training loop: step, evaluate, record, save, leave."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.dist_checkpointing.folder_lock import folder_lock
from megatron_samoe.dist_checkpointing.saving import BackgroundSaver
from megatron_samoe.dist_checkpointing.store import probe_save_dir, whole_iterations
from megatron_samoe.errors import CheckpointError, CommunicationError, MegatronSamoeError
from megatron_samoe.log import logger
from megatron_samoe.parallel_state import launcher
from megatron_samoe.parallel_state.backend import is_communication_failure
from megatron_samoe.training.batches import RunData
from megatron_samoe.training.checkpointing import find_run, load_run, save_run
from megatron_samoe.training.evaluate import evaluate
from megatron_samoe.training.exit_signals import ExitSignals
from megatron_samoe.training.hang_watch import HangWatch
from megatron_samoe.training.hooks import Hook
from megatron_samoe.training.metrics import Record, Stopwatch, evaluation_record, make_record
from megatron_samoe.training.micro_batches import Batch
from megatron_samoe.training.moe_diagnostics import expert_grad_norms, make_diagnostics
from megatron_samoe.training.non_finite import raise_non_finite
from megatron_samoe.training.profiling import StepProfiler
from megatron_samoe.training.replica_check import check_pool_replicas
from megatron_samoe.training.router_health import RouterWatch
from megatron_samoe.training.setup import TrainSetup, initial_state
from megatron_samoe.training.state import TrainState
from megatron_samoe.training.train_step import StepResult, train_step

#: How long an earlier attempt's rank 0 may take to save and leave, on a host that is not this one: torchrun kills it then.
_DYING_S = 40.0


def _run_folder(config: PretrainConfig, name: str) -> Path | None:
    """Returns a folder for what ranks leave behind, if the run has a place for anything."""
    place = config.logging.run_dir or config.checkpoint.save
    return None if place is None else Path(place) / name


class Trainer:
    """Trains from the newest checkpoint, or from the start, to --train-iters or an earlier exit.

    Args:
        hooks: called on rank 0.
    """

    def __init__(self, setup: TrainSetup, data: RunData, hooks: list[Hook]):
        self.setup, self.data = setup, data
        self.config = setup.config
        self.hooks = hooks if setup.parallel.rank == 0 else []
        self.stopwatch = Stopwatch(setup.parallel.world.waits)
        self.router_watch = RouterWatch(setup.config)
        self.began = time.monotonic()
        self.watch = HangWatch(
            _run_folder(self.config, "hangs"),
            setup.parallel.rank,
            60.0 * self.config.parallel.distributed_timeout_minutes,
        )
        self.profiler = StepProfiler(
            self.config.logging, setup.parallel.rank, setup.parallel.device, _run_folder(self.config, "profile")
        )
        self.saver = None
        if self.config.checkpoint.async_save:
            limit = timedelta(minutes=self.config.parallel.distributed_timeout_minutes)
            self.saver = BackgroundSaver(setup.parallel, limit)

    def run(self) -> TrainState:
        """Trains and returns the last state; it has been saved if there is a place to save to.

        Raises:
            CheckpointError: another run writes to the same folder, or it cannot be written to.
            CommunicationError: another rank died or hung; the last checkpoint is intact.
        """
        with self.watch:
            try:
                with self._owned_folder():
                    return self._run()
            except CommunicationError as error:
                error.args = (f"{error}{self.watch.lost_others(str(error))}",)
                raise
            except RuntimeError as error:
                if not is_communication_failure(error):
                    raise
                raise self._lost_another(str(error).splitlines()[0]) from error

    def _lost_another(self, problem: str) -> CommunicationError:
        parallel, watch = self.setup.parallel, self.watch
        return CommunicationError(
            f"Rank {parallel.rank} of {parallel.world_size} lost another rank while {watch.doing}: {problem} "
            f"The last checkpoint is intact.{watch.lost_others(problem)}"
        )

    @contextlib.contextmanager
    def _owned_folder(self) -> Iterator[None]:
        """Keeps other runs away from --save; all ranks raise the same where that fails."""
        root = self.config.checkpoint.save
        with contextlib.ExitStack() as stack:
            problem = None
            if root is not None and not self.config.training.skip_train and self.setup.parallel.rank == 0:
                try:
                    probe_save_dir(root)
                    may_be_dying = launcher.is_again() or self.config.parallel.elastic
                    patience_s = min(_DYING_S, 30.0 * self.config.parallel.distributed_timeout_minutes)
                    stack.enter_context(folder_lock(root, patience_s if may_be_dying else 0.0))
                except CheckpointError as error:
                    problem = str(error)
            problem = self.setup.parallel.world.all_gather_object(problem)[0]
            if problem is not None:
                raise CheckpointError(problem, collective=True)
            yield

    def _run(self) -> TrainState:
        self.watch.begin("loading")
        state = self._start()
        saved_at = state.iteration if self.config.checkpoint.load == self.config.checkpoint.save else None
        with ExitSignals() as signals:
            try:
                self._tell(lambda hook: hook.start(state.iteration))
                if self.config.training.skip_train:
                    self._evaluate_only(state)
                    return state
                batches = self._batches(state)
                while state.iteration < self.config.training.train_iters:
                    state = self._one_step(state, next(batches))
                    reason = self._exit_reason(state, signals)
                    if self._is_due(state, self.config.checkpoint.save_interval) or reason:
                        saved_at = self._save(state, saved_at)
                    if reason:
                        self._finish_saving()
                        logger.info(f"exiting after iteration {state.iteration}: {reason}")
                        return state
                self._save(state, saved_at)
                self._finish_saving()
            finally:
                self.profiler.finish()
                with contextlib.suppress(CheckpointError):  # it has been logged
                    self._finish_saving(timeout_s=60)
                for hook in self.hooks:
                    with contextlib.suppress(OSError):
                        hook.close()
        return state

    def _start(self) -> TrainState:
        state = initial_state(self.setup)
        self._warn_of_starting_again()
        if self.config.checkpoint.save is None and not self.config.training.skip_train:
            logger.info("no --save and no --run-dir: the model is gone when this run ends")
        found = find_run(self.setup)
        if found is None:
            if self.config.checkpoint.load:
                logger.info(f"no checkpoint in {self.config.checkpoint.load}: starting from the beginning")
            return state
        return load_run(self.setup, state, found)

    def _warn_of_starting_again(self) -> None:
        checkpoint = self.config.checkpoint
        if not checkpoint.finetune or checkpoint.save is None or self.config.training.skip_train:
            return
        done = whole_iterations(checkpoint.save)
        if done and checkpoint.save != checkpoint.load:
            logger.info(
                f"--finetune starts at iteration 0 though --save {checkpoint.save} has iteration {done[-1]}, and will "
                f"replace its checkpoints. To go on from there, give --load {checkpoint.save} --pretrained-checkpoint "
                f"{checkpoint.load} in place of --load and --finetune."
            )

    def _tell(self, message: Callable[[Hook], None]) -> None:
        for hook in self.hooks:
            try:
                message(hook)
            except OSError as error:
                raise MegatronSamoeError(
                    f"{hook.place} cannot be written: {error}. The last checkpoint is intact."
                ) from error

    def _batches(self, state: TrainState) -> Iterator[list[Batch]]:
        if state.iteration >= self.config.training.train_iters:
            logger.info(f"all {self.config.training.train_iters} iterations are done; nothing to train")
            return iter(())
        return self.data.train_batches(state.consumed_samples)

    def _one_step(self, state: TrainState, batches: list[Batch]) -> TrainState:
        setup, logs = self.setup, self.config.logging
        last = state.iteration + 1 == self.config.training.train_iters
        will_log = last or (state.iteration + 1) % logs.log_interval == 0
        norms: list[torch.Tensor | None] = []

        def observe() -> None:
            norms.append(expert_grad_norms(setup, state.loss_scale.value))

        wants_layers = will_log and logs.moe_per_layer_logging and setup.model.num_moe_layers > 0
        self.watch.begin(f"computing iteration {state.iteration + 1}")
        self.stopwatch.begin()
        with self.profiler.step(state.iteration + 1):
            result, new_state = train_step(setup, state, batches, observe if wants_layers else None)
        if not result.is_finite:
            raise_non_finite(setup, state, batches, result)
        self.stopwatch.end()
        self._tell(lambda hook: hook.step(new_state.iteration, result.lm_loss))
        if result.routing is not None:
            self.router_watch.step(new_state.iteration, result.routing.health)
        interval = self.config.moe.pool_replica_check_interval
        if interval is not None and new_state.iteration % interval == 0:
            check_pool_replicas(setup, new_state.iteration)
        evaluation = self._maybe_evaluate(new_state, last)
        if will_log or evaluation:
            diagnostics = None
            if wants_layers:
                assert result.routing is not None
                diagnostics = make_diagnostics(setup, result.routing, norms[0])
            record = make_record(setup, new_state, result, self.stopwatch.take(), evaluation, diagnostics)
            if self.data.epoch_samples:
                record["epoch"] = new_state.consumed_samples / self.data.epoch_samples
            self._tell(lambda hook: hook.record(record))
        self._warn_if_wrong(result, state)
        return new_state

    def _maybe_evaluate(self, state: TrainState, last: bool) -> Record:
        training = self.config.training
        if training.eval_iters == 0 or not (last or state.iteration % training.eval_interval == 0):
            return {}
        return self._evaluate(state, with_test=last)

    def _evaluate(self, state: TrainState, with_test: bool) -> Record:
        """Returns what is recorded of the losses on validation and test data."""
        record: Record = {}
        for name, data in (("validation", self.data.valid), ("test", self.data.test if with_test else None)):
            if data is not None:
                self.watch.begin(f"evaluating {name} data after iteration {state.iteration}")
                batches = self.data.evaluation_batches(data)
                record |= evaluation_record(name, evaluate(self.setup, batches, data.names))
        return record

    def _evaluate_only(self, state: TrainState) -> None:
        record = {"iteration": state.iteration, **self._evaluate(state, with_test=True)}
        self._tell(lambda hook: hook.evaluation(record))

    def _warn_if_wrong(self, result: StepResult, before: TrainState) -> None:
        if result.spike is not None:
            first = before.consumed_samples
            logger.info(
                f"iteration {before.iteration + 1}: {result.spike}; samples {first} to {first + self.setup.batch_size - 1} of the "
                f"training data{'; the step was skipped' if result.skipped else ''}"
            )
        elif result.skipped:
            logger.info(f"gradient overflow at loss scale {result.loss_scale}: the step was skipped")

    def _is_due(self, state: TrainState, interval: int | None) -> bool:
        return interval is not None and state.iteration % interval == 0

    def _save(self, state: TrainState, saved_at: int | None) -> int | None:
        if self.config.checkpoint.save is None or saved_at == state.iteration:
            return saved_at
        self.watch.begin(f"saving iteration {state.iteration}")
        save_run(self.setup, state, self.saver, self._report_saved)
        return state.iteration

    def _report_saved(self, path: Path) -> None:
        if not self.config.logging.log_progress:
            logger.info(f"saved {path}")

    def _finish_saving(self, timeout_s: float | None = None) -> None:
        if self.saver is not None:
            self.saver.wait(timeout_s)

    def _exit_reason(self, state: TrainState, signals: ExitSignals) -> str | None:
        """Returns why to leave now, the same on all ranks; None to go on."""
        training = self.config.training
        if self._is_due(state, training.exit_interval):
            return f"--exit-interval {training.exit_interval}"
        minutes = (time.monotonic() - self.began) / 60
        late = training.exit_duration_in_mins is not None and minutes >= training.exit_duration_in_mins
        flags = torch.tensor([signals.received or 0, late], dtype=torch.int32, device=self.setup.parallel.device)
        number, is_late = self.setup.parallel.world.all_reduce(flags, dist.ReduceOp.MAX).tolist()
        if number:
            return f"signal {number} received"
        return f"--exit-duration-in-mins {training.exit_duration_in_mins}" if is_late else None
