"""A teacher in plans: one more model on the same ranks, which is not trained."""

from __future__ import annotations

from functools import lru_cache

from megatron_samoe.config.derived import group_tokens, num_micro_batches
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.dist_checkpointing.teacher import SavedTeacher, find_teacher
from megatron_samoe.models.rank_model import compute_dtype
from megatron_samoe.planning.activation_memory import passes_in_flight
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


def weight_bytes(teacher: PlannedModel, rank: int) -> int:
    """Returns the bytes of a rank's weights, with the experts that its lender folds."""
    return sum(p.numel * p.element_bytes for p in teacher.parameters(rank)) + teacher.lending_costs(rank).weights


def kept_bytes(teacher: PlannedModel, stage: int) -> int:
    """Returns the bytes that a stage keeps until backward passes: logits with the gradient of their divergence, and
    activations in messages that came and went."""
    config, grid, plans = teacher.config, teacher.grid, teacher.stages.chunks_of_stage[stage]
    layout, tokens = config.parallel, group_tokens(config)
    number = num_micro_batches(config, grid.world_size)
    passes = passes_in_flight(layout.pipeline_schedule, grid.pp, stage, len(plans), number)
    width = sum(teacher.description.ends(plan).head_width() for plan in plans if plan.has_head)
    heads = passes if layout.pipeline_schedule == "gpipe" else 1
    local_tokens = tokens // grid.tp if layout.sequence_parallel else tokens
    messages = 2 * passes * local_tokens * config.model.hidden_size if grid.pp > 1 else 0
    return (2 * heads * tokens * width + messages) * compute_dtype(config).itemsize


@lru_cache(maxsize=8)
def _saved(folder: str) -> SavedTeacher:
    """Returns what is read of a teacher once for all the layouts that are planned."""
    return find_teacher(folder)
