"""The learning rate as a function of the iteration."""

from __future__ import annotations

import math

from megatron_samoe.config.training import OptimizerConfig


def _decay_iters(config: OptimizerConfig, train_iters: int) -> int:
    return config.lr_decay_iters or max(train_iters, 1)


def warmup_iters(config: OptimizerConfig, train_iters: int) -> int:
    """Returns the number of warm-up steps."""
    if config.lr_warmup_fraction is not None:
        return int(config.lr_warmup_fraction * _decay_iters(config, train_iters))
    return config.lr_warmup_iters


def learning_rate(config: OptimizerConfig, train_iters: int, iteration: int) -> float:
    """Returns the rate of a step, counted from 0: linear warm-up, then the configured decay, then --min-lr.

    Step i of a warm-up of w steps runs at (i + 1) / w of the highest rate. Megatron's runs at i / w, so its first step
    changes nothing.
    """
    decay_iters, warmup = _decay_iters(config, train_iters), warmup_iters(config, train_iters)
    if iteration < warmup:
        return config.lr * (iteration + 1) / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    if iteration >= decay_iters:
        return config.min_lr
    span = config.lr - config.min_lr
    progress = (iteration - warmup) / max(decay_iters - warmup, 1)
    if config.lr_decay_style == "cosine":
        return config.min_lr + span * 0.5 * (1 + math.cos(math.pi * progress))
    if config.lr_decay_style == "linear":
        return config.min_lr + span * (1 - progress)
    wsd_iters = config.lr_wsd_decay_iters or max(decay_iters // 10, 1)
    return config.min_lr + span * min(1.0, (decay_iters - iteration) / wsd_iters)
