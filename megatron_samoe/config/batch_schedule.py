"""The number of sequences of each optimizer step, which grows with --rampup-batch-size, and of steps with --train-samples.

As Megatron's `RampupBatchsizeNumMicroBatchesCalculator` and `update_train_iters`.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_samoe.config.derived import dense_model_size, global_batch_size
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.training import TrainingConfig


def batch_sizes(config: PretrainConfig, world_size: int) -> tuple[int, ...]:
    """Returns the sequences of a step, from the first size to the last; () where --rampup-batch-size does not fit."""
    full, ramp = global_batch_size(config, world_size), config.training.rampup_batch_size
    if ramp is None:
        return (full,)
    start, increment, samples = ramp if len(ramp) == 3 else (0, 0, 0)
    if min(start, increment, samples) < 1 or start >= full or (full - start) % increment:
        return ()
    return tuple(range(start, full + 1, increment))


def batch_size_after(config: PretrainConfig, world_size: int, consumed_samples: int) -> int:
    """Returns the sequences of the step that comes after so many."""
    sizes, ramp = batch_sizes(config, world_size), config.training.rampup_batch_size
    if ramp is None or consumed_samples > ramp[2]:
        return sizes[-1]
    return sizes[min(int(consumed_samples / (ramp[2] / (len(sizes) - 1))), len(sizes) - 1)]


def samples_after(config: PretrainConfig, world_size: int, consumed_samples: int, steps: int) -> int:
    """Returns the sequences that a run has consumed when it has done so many more steps."""
    ramp = config.training.rampup_batch_size
    while ramp is not None and steps > 0 and consumed_samples <= ramp[2]:
        consumed_samples += batch_size_after(config, world_size, consumed_samples)
        steps -= 1
    return consumed_samples + max(steps, 0) * global_batch_size(config, world_size)


def steps_for_samples(config: PretrainConfig, world_size: int, consumed_samples: int = 0) -> int | None:
    """Returns the steps that --train-samples makes, or makes yet after so many; None without it, or where other options do
    not fit.
    """
    samples = config.training.train_samples
    if samples is None or dense_model_size(config.parallel) < 1:
        return None
    sizes = batch_sizes(config, world_size)
    if not sizes or min(sizes) < 1:
        return None
    ramp, steps = config.training.rampup_batch_size, 0
    while ramp is not None and consumed_samples <= ramp[2]:
        consumed_samples += batch_size_after(config, world_size, consumed_samples)
        steps += 1
    return steps + max(samples - consumed_samples, 0) // sizes[-1]


def with_train_iters(config: PretrainConfig, world_size: int, done: tuple[int, int] = (0, 0)) -> PretrainConfig:
    """Returns the configuration with the --train-iters that --train-samples makes, unless others were given.

    Args:
        done: steps and samples of a run that goes on: batches of another size may have made them.
    """
    steps = steps_for_samples(config, world_size, done[1])
    if steps is None or (done == (0, 0) and config.training.train_iters != TrainingConfig().train_iters):
        return config
    return replace(config, training=replace(config.training, train_iters=done[0] + steps))
