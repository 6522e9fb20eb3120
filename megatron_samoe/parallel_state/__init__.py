"""Ranks, groups, and how parameters lie over them."""

from megatron_samoe.parallel_state.rank_grid import RankGrid
from megatron_samoe.parallel_state.shard_spec import ShardSpec, get_shard_spec, set_shard_spec
from megatron_samoe.parallel_state.state import (
    Group,
    ParallelState,
    initialize_model_parallel,
    single_process_state,
)

__all__ = [
    "Group",
    "ParallelState",
    "RankGrid",
    "ShardSpec",
    "get_shard_spec",
    "initialize_model_parallel",
    "set_shard_spec",
    "single_process_state",
]
