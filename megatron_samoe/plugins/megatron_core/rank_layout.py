"""Where Megatron-Core has put this rank and its layers, as ways of sharing ask for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_samoe.errors import ConfigError
from megatron_samoe.parallel_state.rank_grid import RankGrid
from megatron_samoe.parallel_state.state import ParallelState, planned_state


def rank_state(config: Any) -> ParallelState:
    """Returns this rank's part of Megatron-Core's layout. Only stages can exchange here; all else is Megatron-Core's.

    Args:
        config: Megatron-Core's TransformerConfig.

    Raises:
        ConfigError: the order of the parallel axes is not Megatron-Core's default.
    """
    grid = RankGrid(
        torch.distributed.get_world_size(),
        tp=parallel_state.get_tensor_model_parallel_world_size(),
        pp=parallel_state.get_pipeline_model_parallel_world_size(),
        ep=parallel_state.get_expert_model_parallel_world_size(),
        etp=parallel_state.get_expert_tensor_parallel_world_size(),
        cp=parallel_state.get_context_parallel_world_size(),
    )
    rank = torch.distributed.get_rank()
    theirs = {
        "tp": parallel_state.get_tensor_model_parallel_rank(),
        "pp": parallel_state.get_pipeline_model_parallel_rank(),
        "ep": parallel_state.get_expert_model_parallel_rank(),
        "etp": parallel_state.get_expert_tensor_parallel_rank(),
        "edp": parallel_state.get_expert_data_parallel_rank(),
    }
    ours = {axis: grid.size_and_rank(axis, rank)[1] for axis in theirs}
    if ours != theirs:
        raise ConfigError("order of parallel axes", theirs, f"must be Megatron-Core's default, which gives {ours}")
    device = torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())
    state = planned_state(grid, rank, config.sequence_parallel)
    stages = replace(state.pp, handle=parallel_state.get_pipeline_model_parallel_group())
    return replace(state, device=device, pp=stages)


def is_moe_layer(config: Any) -> list[bool]:
    """Returns for each layer of the model whether it has experts, as Megatron-Core's block spec reads moe_layer_freq."""
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(config.num_layers)]
    return [bool(is_moe) for is_moe in frequency]


def layers_of_stage(config: Any) -> tuple[tuple[int, ...], ...]:
    """Returns the layers, from 0, that each pipeline stage holds, by Megatron-Core's own count."""
    chunks = config.virtual_pipeline_model_parallel_size or 1
    given = config.pipeline_model_parallel_layout
    stages = []
    for stage in range(config.pipeline_model_parallel_size):
        layers: list[int] = []
        for chunk in range(chunks):
            place = {"vp_stage": chunk if chunks > 1 else None, "pp_rank": stage}
            if given is not None:  # of which the functions below say this rank's stage only
                layers += given.get_layer_id_list(**place)
                continue
            first = get_transformer_layer_offset(config, **place)
            layers += range(first, first + get_num_layers_to_build(config, **place))
        stages.append(tuple(layers))
    return tuple(stages)
