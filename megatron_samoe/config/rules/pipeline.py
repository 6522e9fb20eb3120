"""Rules of pipeline stages, and of the layers and micro-batches that they share."""

from __future__ import annotations

from megatron_samoe.config.batch_schedule import batch_sizes
from megatron_samoe.config.derived import (
    data_parallel_size,
    dense_model_size,
    divisors,
    global_batch_size,
    num_micro_batches,
    parse_stage_layout,
    virtual_stages,
)
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.rules import Problems
from megatron_samoe.errors import ConfigError


def _is_pipeline(config: PretrainConfig, world_size: int) -> bool:
    """Returns whether there are several stages and other rules accept their sizes."""
    parallel = config.parallel
    pp = parallel.pipeline_model_parallel_size
    per_stage = parallel.num_layers_per_virtual_pipeline_stage
    dense = dense_model_size(parallel)
    sizes = (dense, config.model.num_layers, 1 if per_stage is None else per_stage)
    return pp > 1 and min(sizes) >= 1 and world_size % dense == 0


def _num_stages(config: PretrainConfig) -> int:
    """Returns the number of stages of all ranks, virtual ones included; 0 where they do not divide the layers."""
    layout = config.parallel.pipeline_model_parallel_layout
    if layout is None:
        return virtual_stages(config.parallel, config.model.num_layers)
    try:
        return len(parse_stage_layout(layout))
    except ConfigError:
        return 0


def _stage_layout(config: PretrainConfig, world_size: int) -> Problems:
    parallel, layers, pp = config.parallel, config.model.num_layers, config.parallel.pipeline_model_parallel_size
    layout, per_stage = parallel.pipeline_model_parallel_layout, parallel.num_layers_per_virtual_pipeline_stage
    if layout is None or not _is_pipeline(config, world_size):
        return
    if per_stage is not None:
        yield ConfigError(
            "--num-layers-per-virtual-pipeline-stage", per_stage, "excludes --pipeline-model-parallel-layout"
        )
    try:
        counts = parse_stage_layout(layout)
    except ConfigError as error:
        yield error
        return
    if sum(counts) != layers:
        yield ConfigError(
            "--pipeline-model-parallel-layout", layout, f"has {sum(counts)} layers; --num-layers is {layers}"
        )
    if len(counts) % pp:
        yield ConfigError("--pipeline-model-parallel-layout", layout, f"has {len(counts)} stages; a multiple of "
                          f"--pipeline-model-parallel-size {pp} is needed")  # fmt: skip


def _layers_share_out(config: PretrainConfig, world_size: int) -> Problems:
    parallel, layers, pp = config.parallel, config.model.num_layers, config.parallel.pipeline_model_parallel_size
    per_stage = parallel.num_layers_per_virtual_pipeline_stage
    if parallel.pipeline_model_parallel_layout is not None or not _is_pipeline(config, world_size):
        return
    if _num_stages(config) > 0:
        return
    if per_stage is None:
        yield ConfigError("--pipeline-model-parallel-size", pp, f"must divide --num-layers {layers} "
                          f"(one of {divisors(layers)}), or give --pipeline-model-parallel-layout")  # fmt: skip
    else:
        legal = [d for d in divisors(layers) if layers % (pp * d) == 0]
        yield ConfigError("--num-layers-per-virtual-pipeline-stage", per_stage,
                          f"times --pipeline-model-parallel-size {pp} must divide --num-layers {layers}: one of {legal}")  # fmt: skip


def _virtual_stages(config: PretrainConfig, world_size: int) -> Problems:
    parallel, pp = config.parallel, config.parallel.pipeline_model_parallel_size
    if not _is_pipeline(config, world_size) or _num_stages(config) <= pp:
        return
    if parallel.pipeline_schedule == "gpipe":
        yield ConfigError("--pipeline-schedule", "gpipe", "has no virtual stages; use 1f1b")
    micro_batches = num_micro_batches(config, world_size) if config.training.micro_batch_size > 0 else 0
    per_pass = config.training.micro_batch_size * data_parallel_size(config, world_size)
    odd = [n // per_pass for n in batch_sizes(config, world_size) if per_pass > 0 and n // per_pass % pp]
    if micro_batches % pp == 0 and odd:
        yield ConfigError("--rampup-batch-size", config.training.rampup_batch_size,
                          f"makes {odd[0]} micro-batches per step; interleaved virtual stages need a multiple of "
                          f"--pipeline-model-parallel-size {pp}")  # fmt: skip
    if micro_batches % pp:
        yield ConfigError("--global-batch-size", global_batch_size(config, world_size),
                          f"makes {micro_batches} micro-batches per step; interleaved virtual stages need a multiple of "
                          f"--pipeline-model-parallel-size {pp}")  # fmt: skip


RULES = (_stage_layout, _layers_share_out, _virtual_stages)
