"""The learning rate as a function of a run's progress, in steps or, with --train-samples, in samples."""

from __future__ import annotations

import math

from megatron_samoe.config.training import OptimizerConfig, TrainingConfig


def _decay_length(config: OptimizerConfig, length: int) -> int:
    return config.lr_decay_samples or config.lr_decay_iters or max(length, 1)


def warmup_length(config: OptimizerConfig, length: int) -> int:
    """Returns how long the warm-up is, in the unit of `length`, the length of training."""
    if config.lr_warmup_fraction is not None:
        return int(config.lr_warmup_fraction * _decay_length(config, length))
    return config.lr_warmup_samples or config.lr_warmup_iters


def training_length(training: TrainingConfig) -> int:
    """Returns how long training is: samples with --train-samples, else steps."""
    return training.train_iters if training.train_samples is None else training.train_samples


def rate_of_step(
    config: OptimizerConfig, training: TrainingConfig, iteration: int, consumed_samples: int, batch_size: int
) -> float:
    """Returns the rate of the step of `batch_size` samples after a number of steps, or samples."""
    if training.train_samples is None:
        return learning_rate(config, training.train_iters, iteration)
    return learning_rate(config, training.train_samples, consumed_samples, batch_size)


def learning_rate(config: OptimizerConfig, length: int, done: int, step: int = 1) -> float:
    """Returns the rate of a step: linear warm-up, then the configured decay, then --min-lr.

    Step i of a warm-up of w steps, counted from 0, runs at (i + 1) / w of the highest rate. Megatron's runs at i / w, so
    its first step changes nothing.

    Args:
        length: of training, in steps or in samples, as all of these.
        done: what is done before the step.
        step: length of the step.
    """
    decay, warmup = _decay_length(config, length), warmup_length(config, length)
    if done < warmup:
        return config.lr * min(done + step, warmup) / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    if done >= decay:
        return config.min_lr
    span = config.lr - config.min_lr
    progress = (done - warmup) / max(decay - warmup, 1)
    if config.lr_decay_style == "cosine":
        return config.min_lr + span * 0.5 * (1 + math.cos(math.pi * progress))
    if config.lr_decay_style == "linear":
        return config.min_lr + span * (1 - progress)
    wsd = config.lr_wsd_decay_samples or config.lr_wsd_decay_iters or max(decay // 10, 1)
    return config.min_lr + span * min(1.0, (decay - done) / wsd)
