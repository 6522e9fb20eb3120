"""A run's folder, which no other run may write to while it trains."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.dist_checkpointing.folder_lock import NAME, folder_lock
from megatron_samoe.dist_checkpointing.store import probe_save_dir
from megatron_samoe.errors import CheckpointError, ConfigError
from megatron_samoe.parallel_state import launcher
from megatron_samoe.parallel_state.state import ParallelState

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
            _refuse_unshared(Path(root), parallel, min(_CACHED_S, 30.0 * config.parallel.distributed_timeout_minutes))
        yield


def _refuse_unshared(root: Path, parallel: ParallelState, patience_s: float) -> None:
    """Raises ConfigError, the same on all ranks, where a rank does not see what rank 0 writes to the folder."""
    until = time.monotonic() + patience_s
    written = parallel.world.all_gather_object(_read(root / NAME))[0]
    while _read(root / NAME) != written and time.monotonic() < until:
        time.sleep(0.2)
    blind = parallel.world.all_gather_object(socket.gethostname() if _read(root / NAME) != written else None)
    for rank, host in enumerate(blind):
        if host is not None:
            raise ConfigError("--save", str(root), "must be a folder that all hosts share: what rank 0 writes to it does not "
                              f"come to {host} (rank {rank})")  # fmt: skip


def _read(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        return path.read_text()
    return None
