"""The folder where a run saves: it is only this run's, and has room for its checkpoints while nothing can be lost."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_samoe.config.checkpoint import CheckpointConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.dist_checkpointing.folder_lock import NAME, folder_lock
from megatron_samoe.dist_checkpointing.saving import bytes_to_write, look_for_room
from megatron_samoe.dist_checkpointing.store import probe_save_dir, whole_iterations
from megatron_samoe.errors import CheckpointError, ConfigError, HostDiffersError, in_units
from megatron_samoe.log import logger
from megatron_samoe.parallel_state import launcher
from megatron_samoe.parallel_state.meeting import common, refused
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.parsing import read_text
from megatron_samoe.training.checkpointing import run_state
from megatron_samoe.training.setup import TrainSetup
from megatron_samoe.training.state import TrainState

#: How long an earlier attempt's rank 0 may take to save and leave, on a host that is not this one: torchrun kills it then.
_DYING_S = 40.0
#: How long a host of a network file system may take a folder for what it was before.
_CACHED_S = 60.0


@contextlib.contextmanager
def owned_folder(config: PretrainConfig, parallel: ParallelState) -> Iterator[None]:
    """Keeps other runs away from --save; all ranks raise the same CheckpointError where that fails."""
    root = config.checkpoint.save
    with contextlib.ExitStack() as stack:
        problem = None
        if root is not None and not config.training.skip_train and parallel.rank == 0:
            try:
                probe_save_dir(root)
                may_be_dying = launcher.is_again() or config.parallel.elastic
                patience_s = min(_DYING_S, 30.0 * config.parallel.distributed_timeout_minutes)
                stack.enter_context(folder_lock(root, patience_s if may_be_dying else 0.0))
            except CheckpointError as error:
                problem = str(error)
        problem = parallel.world.all_gather_object(problem)[0]
        if problem is not None:
            raise CheckpointError(problem, collective=True)
        if root is not None and not config.training.skip_train:
            patience_s = min(_CACHED_S, 30.0 * config.parallel.distributed_timeout_minutes)
            _refuse_unshared(Path(root), parallel, patience_s, config.parallel.elastic)
        launcher.become_member()
        yield


def _refuse_unshared(root: Path, parallel: ParallelState, patience_s: float, elastic: bool) -> None:
    """Finds ranks that do not see what rank 0 writes to the folder.

    Raises:
        ConfigError: the same on all ranks; also on those only that differ from an elastic job's members.
        HostRefusedError: on the others then.
    """
    until = time.monotonic() + patience_s
    written = parallel.world.all_gather_object(_read(root / NAME))[0]
    while _read(root / NAME) != written and time.monotonic() < until:
        time.sleep(0.2)
    own = (socket.gethostname(), elastic and launcher.is_member(), _read(root / NAME) == written)
    ranks = list(enumerate(parallel.world.all_gather_object(own)))
    blind = [f"{host} (rank {rank})" for rank, (host, _, sees) in ranks if not sees]
    if not blind:
        return
    allowed = (
        f"must be a folder that all hosts share: what {ranks[0][1][0]} (rank 0) writes does not come to {blind[0]}"
    )
    problem = ConfigError("--save", str(root), allowed)
    member = common({rank: sees for rank, (_, is_member, sees) in ranks if is_member})
    if member is None:
        raise problem
    usual = ranks[member][1][2]
    if own[2] == usual:
        raise refused([host for _, (host, _, sees) in ranks if sees != usual], str(problem))
    error = HostDiffersError([problem])
    error.collective = launcher.local_rank() > 0
    raise error


def _read(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        return read_text(path)
    return None


class DiskRoom:
    """Ends a run that could not save, before it trains on. All ranks make it, and call it, together.

    Args:
        parallel: the ranks, for the thread that calls `look`.
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
            f"a checkpoint takes {in_units(self._num_bytes, 'B')}; {self._config.save} has {in_units(free, 'B')} left"
        )
        if (kept - self._to_be_deleted()) * self._num_bytes > free:
            logger.info(
                f"{kept} checkpoints, the most that this run will hold, take {in_units(kept * self._num_bytes, 'B')}: the run "
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
