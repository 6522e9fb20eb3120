"""Rules of pipeline stages, and of the layers and micro-batches that they share."""

from __future__ import annotations

from megatron_samoe.config.derived import (
    batch_sizes,
    data_parallel_size,
    dense_model_size,
    divisors,
    global_batch_size,
    num_micro_batches,
    parse_stage_layout,
    virtual_stages,
)
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.rules import Rows, Table


def _stages(config: PretrainConfig, world_size: int) -> Rows:
    parallel, layers = config.parallel, config.model.num_layers
    pp, per_stage = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    layout = parallel.pipeline_model_parallel_layout
    if pp == 1 or world_size % dense_model_size(parallel):
        return
    if layout is not None:
        allowed = "excludes --pipeline-model-parallel-layout"
        yield "num_layers_per_virtual_pipeline_stage", per_stage is not None, allowed
        counts = parse_stage_layout(layout)
        allowed = f"has {sum(counts)} layers; --num-layers is {layers}"
        yield "pipeline_model_parallel_layout", sum(counts) != layers, allowed
        allowed = f"has {len(counts)} stages; a multiple of --pipeline-model-parallel-size {pp} is needed"
        yield "pipeline_model_parallel_layout", len(counts) % pp, allowed
    stages = virtual_stages(parallel, layers)
    is_whole = per_stage is None
    allowed = f"must divide --num-layers {layers} (one of {divisors(layers)}), or give --pipeline-model-parallel-layout"
    yield "pipeline_model_parallel_size", stages == 0 and is_whole, allowed
    legal = [d for d in divisors(layers) if layers % (pp * d) == 0]
    allowed = f"times --pipeline-model-parallel-size {pp} must divide --num-layers {layers}: one of {legal}"
    yield "num_layers_per_virtual_pipeline_stage", stages == 0 and not is_whole, allowed
    if stages > pp:
        yield from _virtual_stages(config, world_size)


def _virtual_stages(config: PretrainConfig, world_size: int) -> Rows:
    pp, total = config.parallel.pipeline_model_parallel_size, global_batch_size(config, world_size)
    micro_batches = num_micro_batches(config, world_size)
    is_gpipe = config.parallel.pipeline_schedule == "gpipe"
    yield "pipeline_schedule", is_gpipe, "has no virtual stages; use 1f1b"
    per_pass = config.training.micro_batch_size * data_parallel_size(config, world_size)
    in_steps = [size // per_pass for size in batch_sizes(config, world_size)]
    odd = next((number for number in in_steps if number % pp), 0)
    allowed = (
        f"micro-batches per step; interleaved virtual stages need a multiple of --pipeline-model-parallel-size {pp}"
    )
    yield "rampup_batch_size", micro_batches % pp == 0 and odd, f"makes {odd} {allowed}"
    yield "global_batch_size", micro_batches % pp, f"makes {micro_batches} {allowed}", total


TABLES = (Table(("parallel", "model", "training"), _stages),)
