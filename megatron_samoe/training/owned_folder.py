"""A run's folder, which no other run may write to while it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.dist_checkpointing.folder_lock import folder_lock
from megatron_samoe.dist_checkpointing.store import probe_save_dir
from megatron_samoe.errors import CheckpointError
from megatron_samoe.parallel_state import launcher
from megatron_samoe.parallel_state.state import ParallelState

#: How long an earlier attempt's rank 0 may take to save and leave, on a host that is not this one: torchrun kills it then.
_DYING_S = 40.0


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
        yield
