"""A teacher as the planner sees it: one more model on the same ranks."""

from __future__ import annotations

from functools import lru_cache

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.dist_checkpointing.teacher import SavedTeacher, find_teacher
from megatron_samoe.planning.description import PlannedModel


def planned_teacher(config: PretrainConfig, vocab_size: int, world_size: int) -> PlannedModel | None:
    """Returns the teacher that a configuration names, in the layout of its student; None without one.

    Raises:
        CheckpointError, ConfigError: as `find_teacher` and `SavedTeacher.on_ranks_of`.
    """
    folder = config.distillation.teacher
    if folder is None:
        return None
    return PlannedModel(_saved(folder).on_ranks_of(config, vocab_size, world_size), vocab_size, world_size)


@lru_cache(maxsize=8)
def _saved(folder: str) -> SavedTeacher:
    """Returns what is read of a teacher once for all the layouts that are planned."""
    return find_teacher(folder)
