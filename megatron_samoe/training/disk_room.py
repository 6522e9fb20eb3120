"""Room on the disk for a run's checkpoints, looked at while nothing can be lost."""

from __future__ import annotations

from megatron_samoe.config.checkpoint import CheckpointConfig
from megatron_samoe.dist_checkpointing.saving import bytes_to_write, look_for_room, shown_bytes
from megatron_samoe.dist_checkpointing.store import whole_iterations
from megatron_samoe.log import logger
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.training.checkpointing import run_state
from megatron_samoe.training.setup import TrainSetup
from megatron_samoe.training.state import TrainState


class DiskRoom:
    """Ends a run that could not save, before it trains on. All ranks make it, and call it, together.

    Args:
        parallel: the ranks as the thread that calls `look` meets them.
    """

    def __init__(self, setup: TrainSetup, state: TrainState, parallel: ParallelState):
        self._config, self._parallel = setup.config.checkpoint, parallel
        self._last = setup.config.training.train_iters
        own = bytes_to_write(run_state(setup, state))
        files = sum(map(len, setup.attachments.values()))
        self._num_bytes = sum(setup.parallel.world.all_gather_object(own)) + files

    def look_ahead(self, iteration: int) -> None:
        """Says what the checkpoints to come take, and what there is.

        Raises:
            CheckpointError: not even one has room.
        """
        free = self._look("begin to train")
        kept = most_checkpoints(self._config, iteration, self._last)
        logger.info(
            f"a checkpoint takes {shown_bytes(self._num_bytes)}; {self._config.save} has {shown_bytes(free)} left"
        )
        if (kept - self._to_be_deleted()) * self._num_bytes > free:
            logger.info(
                f"{kept} checkpoints, as many as this run comes to hold, take {shown_bytes(kept * self._num_bytes)}: the run "
                "will end when there is no more room. --keep-last keeps fewer, a longer --save-interval makes fewer"
            )

    def _to_be_deleted(self) -> int:
        """Returns the checkpoints that are there and make room for new ones."""
        config = self._config
        keeps_all = config.keep_last is None and config.save_retain_interval is None
        return 0 if keeps_all or config.save is None else len(whole_iterations(config.save))

    def look(self, iteration: int) -> None:
        """Raises CheckpointError where the save after that of this iteration would have no room."""
        if iteration < self._last:
            self._look(f"train on after iteration {iteration}, which is saved")

    def _look(self, what: str) -> int:
        assert self._config.save is not None
        return look_for_room(self._config.save, self._num_bytes, self._parallel, what)


def most_checkpoints(config: CheckpointConfig, iteration: int, last: int) -> int:
    """Returns the most checkpoints that a run holds at a time of those that it makes after an iteration."""
    interval, retain = config.save_interval, config.save_retain_interval
    made = {last} if interval is None else {last, *range(iteration - iteration % interval + interval, last, interval)}
    if config.keep_last is None and retain is None:
        return len(made)
    retained = 0 if retain is None else sum(i % retain == 0 for i in made)
    return min(len(made), retained + (config.keep_last or 1) + 1)
