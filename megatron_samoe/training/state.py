"""What a run carries from step to step besides weights and optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from megatron_samoe.optimizer.mixed_precision import LossScale
from megatron_samoe.training.spikes import SpikeHistory

#: Key of the CUDA kernels that a run uses, beside the state in a checkpoint.
CUDA_KERNELS = "cuda_kernels"
#: Key of how experts are multiplied in bf16 on CPUs, likewise.
BF16_PRODUCTS = "bf16_products"
#: Keys of `TrainState.plain`.
PLAIN_KEYS = ("iteration", "consumed_samples", "consumed_tokens", "loss_scale")


@dataclass(frozen=True)
class TrainState:
    """Progress of a run. Noise and sample order are functions of it, so no generator state exists.

    Attributes:
        iteration: optimizer steps done.
        spikes: what a step is compared with, with --spike-window.
        expert_fractions_LE: share of routed tokens per MoE layer and expert in the last step; uniform at the start.
    """

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    loss_scale: LossScale
    expert_fractions_LE: Tensor | None = None
    spikes: SpikeHistory = field(default_factory=SpikeHistory)

    def plain(self) -> dict[str, Any]:
        """Returns all but tensors, as JSON values."""
        return {
            "iteration": self.iteration,
            "consumed_samples": self.consumed_samples,
            "consumed_tokens": self.consumed_tokens,
            "loss_scale": asdict(self.loss_scale),
            **({"spike_history": self.spikes.plain()} if self.spikes.losses else {}),
        }

    @staticmethod
    def from_plain(values: Mapping[str, Any], expert_fractions_LE: Tensor | None) -> TrainState:
        """Returns the state that `plain` described."""
        return TrainState(
            values["iteration"],
            values["consumed_samples"],
            values["consumed_tokens"],
            LossScale(**values["loss_scale"]),
            expert_fractions_LE,
            SpikeHistory.from_plain(values.get("spike_history") or {}),
        )
