"""The final configuration of a run: what was asked for, on the ranks that there are, from where the run begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_samoe.config.checkpoint import CheckpointConfig
from megatron_samoe.config.derived import with_train_iters
from megatron_samoe.config.pretrain import PretrainConfig


@dataclass(frozen=True)
class Beginning:
    """Where a run begins.

    Attributes:
        checkpoint: the options of checkpoints, with what --pretrained-checkpoint means for this start.
        iteration, samples: that the run has behind it.
        kernels: CUDA kernels that it has used so far, and products how CPUs multiplied experts in bf16; None for a run that
            has none behind it.
    """

    checkpoint: CheckpointConfig
    iteration: int = 0
    samples: int = 0
    kernels: Sequence[str] | None = None
    products: str | None = None


def resolve(asked: PretrainConfig, world_size: int, beginning: Beginning) -> PretrainConfig:
    """Returns what a run trains with: the steps that --train-samples makes from here, and the checkpoint to go on from."""
    config = with_train_iters(asked, world_size, (beginning.iteration, beginning.samples))
    return replace(config, checkpoint=beginning.checkpoint)
