"""Everything that a run is made of, built once from its configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.validate import global_batch_size
from megatron_samoe.distributed.grad_buffer import GradBuffers
from megatron_samoe.models.rank_model import RankModel, build_model
from megatron_samoe.optimizer.mixed_precision import LossScale, MixedPrecisionOptimizer
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.training.state import TrainState


@dataclass(frozen=True)
class TrainSetup:
    """One rank's model with what trains it."""

    config: PretrainConfig
    parallel: ParallelState
    model: RankModel
    buffers: GradBuffers
    optimizer: MixedPrecisionOptimizer

    @property
    def batch_size(self) -> int:
        """Sequences of one optimizer step over all ranks."""
        return global_batch_size(self.config, self.parallel.world_size)

    @property
    def num_micro_batches(self) -> int:
        """Forward passes per optimizer step on each rank."""
        return self.batch_size // (self.config.training.micro_batch_size * self.parallel.dp.size)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.batch_size * self.config.model.seq_length


def build_setup(
    config: PretrainConfig, vocab_size: int, parallel: ParallelState, dtype: torch.dtype | None = None
) -> TrainSetup:
    """Returns model, gradient buffers and optimizer of this rank, with initial weights.

    Args:
        dtype: of weights and activations, in place of the configured precision.
    """
    if config.training.deterministic_mode:
        torch.use_deterministic_algorithms(True)
    model = build_model(config, vocab_size, parallel, dtype)
    buffers = GradBuffers(model.global_parameters(), parallel)
    return TrainSetup(config, parallel, model, buffers, MixedPrecisionOptimizer(buffers.parameters, config.optimizer))


def initial_state(setup: TrainSetup) -> TrainState:
    """Returns the state of a run that has not begun: experts count as evenly loaded."""
    moe = setup.config.moe
    fractions = None
    if setup.model.num_moe_layers:
        shape = (setup.model.num_moe_layers, moe.num_experts)
        fractions = torch.full(shape, 1 / moe.num_experts, device=setup.parallel.device)
    return TrainState(0, 0, 0, LossScale.of(setup.config.training), fractions)
