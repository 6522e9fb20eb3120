"""The choice of a layout for another number of ranks than the configured layout needs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from megatron_samoe.config.derived import data_parallel_size, divisors
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.teacher import on_ranks_of
from megatron_samoe.config.training import LoggingConfig
from megatron_samoe.config.validate import validate, without_idle_options
from megatron_samoe.errors import ConfigError
from megatron_samoe.log import logger


def fit_to_ranks(
    config: PretrainConfig, started: int, teacher: PretrainConfig | None = None
) -> tuple[PretrainConfig, int]:
    """Returns a legal configuration for the ranks that were started, and how many of them it uses: with --elastic that of
    `fit_layout`, whose arguments these are.
    """
    if not config.parallel.elastic:
        validate(config, started)
        return config, started
    fitted, used = fit_layout(config, started, teacher)
    layout, wanted = fitted.parallel, config.parallel
    logger.info(
        f"elastic: {used} of {started} ranks work as tensor {layout.tensor_model_parallel_size}, "
        + (f"context {layout.context_parallel_size}, " if layout.context_parallel_size > 1 else "")
        + f"pipeline {layout.pipeline_model_parallel_size}, expert {layout.expert_model_parallel_size}, data "
        f"{data_parallel_size(fitted, used)}, micro-batches of {fitted.training.micro_batch_size}"
        + ("" if layout == wanted else " (another layout than was asked for)")
        + (f"; {started - used} stand by" if used < started else "")
    )
    return fitted, used


def fit_layout(
    config: PretrainConfig, world_size: int, teacher: PretrainConfig | None = None
) -> tuple[PretrainConfig, int]:
    """Returns the configuration in the nearest layout that is legal for `world_size` ranks, and how many of them it
    uses.

    Data parallelism changes first. Then expert, pipeline, context and tensor parallelism shrink, in this order. A
    micro-batch shrinks where that keeps more ranks at work. The global batch stays, so the losses stay what they would have been.

    Args:
        teacher: the configuration that a teacher was trained with, whose model must fit the layout too.

    Raises:
        ConfigError: the configuration is illegal with any number of ranks, or no legal layout has at most `world_size`
            ranks.
    """
    smallest = smallest_world(config)
    # An error that no number of ranks cures is reported, not worked around.
    multiples = [smallest * times for times in divisors(config.training.global_batch_size or 1)]
    if not any(_is_legal(config, ranks, teacher) for ranks in multiples):
        validate(config, smallest)
        if teacher is not None:
            on_ranks_of(config, teacher, smallest)
    for candidates in _nearest_first(config):
        for used in range(world_size, 0, -1):
            for candidate in candidates:
                if _is_legal(candidate, used, teacher):
                    return candidate, used
    raise ConfigError("--elastic", True, f"finds no legal layout for {world_size} ranks")


def smallest_world(config: PretrainConfig) -> int:
    """Returns the smallest number of ranks that the layout allows, lcm(tp * cp, etp * ep) * pp; illegal sizes, which `validate`
    refuses later, count as 1."""
    layout = config.parallel
    dense = layout.tensor_model_parallel_size * layout.context_parallel_size
    expert = layout.expert_tp * layout.expert_model_parallel_size
    return math.lcm(max(dense, 1), max(expert, 1)) * max(layout.pipeline_model_parallel_size, 1)


def _nearest_first(config: PretrainConfig) -> Iterator[list[PretrainConfig]]:
    """Yields configurations of one tensor, context and pipeline size at a time, nearest first."""
    layout = config.parallel
    micro_batches = [config.training.micro_batch_size]
    if config.moe.moe_expert_capacity_factor is None:  # which counts tokens of a micro-batch
        micro_batches = divisors(config.training.micro_batch_size)[::-1]
    for tp, cp in product(
        divisors(layout.tensor_model_parallel_size)[::-1], divisors(layout.context_parallel_size)[::-1]
    ):
        for pp in divisors(layout.pipeline_model_parallel_size)[::-1]:
            sized = replace(
                layout, tensor_model_parallel_size=tp, context_parallel_size=cp, pipeline_model_parallel_size=pp
            )
            if tp != layout.tensor_model_parallel_size:
                split = layout.expert_tensor_parallel_size not in (None, 1)
                sized = replace(
                    sized,
                    expert_tensor_parallel_size=tp if split else layout.expert_tensor_parallel_size,
                    sequence_parallel=layout.sequence_parallel and tp > 1,
                )
            if pp != layout.pipeline_model_parallel_size:
                sized = replace(sized, num_layers_per_virtual_pipeline_stage=None, pipeline_model_parallel_layout=None)
            yield [
                without_idle_options(
                    replace(
                        config,
                        parallel=replace(sized, expert_model_parallel_size=ep),
                        training=replace(config.training, micro_batch_size=micro_batch),
                    ),
                    ("parallel",),
                )
                for ep in divisors(layout.expert_model_parallel_size)[::-1]
                for micro_batch in micro_batches
            ]


def _is_legal(config: PretrainConfig, world_size: int, teacher: PretrainConfig | None) -> bool:
    plain = replace(config, logging=LoggingConfig())  # which ranks are profiled does not depend on layouts
    config = plain if world_size < max(config.logging.profile_ranks, default=0) + 1 else config
    try:
        validate(config, world_size)
        if teacher is not None:
            on_ranks_of(config, teacher, world_size)
    except ConfigError:
        return False
    return True
