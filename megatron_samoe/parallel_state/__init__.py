"""Ranks, their groups, and how parameters are sharded over them."""

from megatron_samoe.parallel_state.parameter_tag import ParameterTag, set_tag, tag_of
from megatron_samoe.parallel_state.rank_grid import RankGrid
from megatron_samoe.parallel_state.shard_spec import ShardSpec
from megatron_samoe.parallel_state.state import (
    Group,
    ParallelState,
    initialize_model_parallel,
    single_process_state,
)

__all__ = [
    "Group",
    "ParallelState",
    "ParameterTag",
    "RankGrid",
    "ShardSpec",
    "initialize_model_parallel",
    "set_tag",
    "single_process_state",
    "tag_of",
]
