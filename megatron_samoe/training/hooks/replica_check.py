"""Whether ranks that should hold the same banks do."""

from __future__ import annotations

import hashlib

from megatron_samoe.dist_checkpointing.store import newest_in_words
from megatron_samoe.errors import ReplicaDriftError
from megatron_samoe.parallel_state.parameter_tag import tag_of
from megatron_samoe.training.hook import Hook, Training
from megatron_samoe.training.setup import TrainSetup
from megatron_samoe.training.train_step import StepResult


class ReplicaCheck(Hook):
    """Checks every `interval` steps (--pool-replica-check-interval)."""

    def __init__(self, interval: int):
        self._interval = interval

    def post_step(self, run: Training, result: StepResult) -> None:
        """Raises ReplicaDriftError where two copies differ."""
        if run.state.iteration % self._interval == 0:
            check_pool_replicas(run.setup, run.state.iteration)


def check_pool_replicas(setup: TrainSetup, iteration: int) -> None:
    """Compares hashes of the pool's banks between all holders of copies, over stages and data; all ranks call it.

    Raises:
        ReplicaDriftError: two copies differ; on every rank that holds one of them.
    """
    pool = setup.model.expert_pool
    assert pool is not None
    for name, bank in pool.named_parameters():
        group = setup.parallel.group(tag_of(bank).gradient_group)
        digest = hashlib.blake2b(bank.detach().cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()
        digests = group.all_gather_object(digest)
        if len(set(digests)) > 1:
            odd = [rank for rank, d in zip(group.ranks, digests, strict=True) if d != digests[0]]
            raise ReplicaDriftError(
                f"Iteration {iteration}: copies of the pool's {name} differ: ranks {odd} against rank {group.ranks[0]}. "
                f"Weights are no longer those of one model. {newest_in_words(setup.config.checkpoint.save)} Look for faulty "
                "memory or a broken link on these ranks."
            )
