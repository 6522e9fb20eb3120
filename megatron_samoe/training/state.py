"""The state that a run carries from step to step, except weights and optimizer state."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from megatron_samoe.config.training import TrainingConfig
from megatron_samoe.optimizer.mixed_precision import LossScale

#: Key of the CUDA kernels that a run uses, next to the state in a checkpoint.
CUDA_KERNELS = "cuda_kernels"
#: Key of how experts are multiplied in bf16 on CPUs, likewise.
BF16_PRODUCTS = "bf16_products"
#: Keys of `TrainState.plain`.
PLAIN_KEYS = ("iteration", "consumed_samples", "consumed_tokens", "loss_scale")


@dataclass(frozen=True)
class SpikeHistory:
    """Losses and gradient norms of the last steps, at most --spike-window of them."""

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()

    def problem(self, loss: float, norm: float, training: TrainingConfig) -> str | None:
        """Returns what is wrong with a step in a few words; None where nothing is, or too little is known.

        As OLMo-core's skipped steps: beyond the mean by some standard deviations of a window of steps.
        """
        if not training.spike_window or len(self.losses) < training.spike_window:
            return None
        for name, value, before in (("loss", loss, self.losses), ("gradient norm", norm, self.norms)):
            mean, deviation = statistics.fmean(before), statistics.pstdev(before)
            if value > mean + training.spike_sigmas * deviation:
                return (
                    f"{name} {value:.4g} is far above the mean {mean:.4g} (standard deviation {deviation:.3g}) of the last "
                    f"{len(before)} steps"
                )
        return None

    def after(self, loss: float, norm: float, training: TrainingConfig) -> SpikeHistory:
        """Returns the history after a step; a spike is part of it, so that a new level soon counts as usual."""
        if not training.spike_window or not (math.isfinite(loss) and math.isfinite(norm)):
            return self
        window = training.spike_window
        return SpikeHistory((*self.losses, loss)[-window:], (*self.norms, norm)[-window:])

    @staticmethod
    def from_plain(values: Mapping[str, Any]) -> SpikeHistory:
        """Returns what a checkpoint has of a history; empty where a checkpoint has nothing of the kind."""
        lists = [values.get(name, ()) for name in ("losses", "norms")]
        sound = all(isinstance(v, (list, tuple)) and all(type(x) is float for x in v) for v in lists)
        return SpikeHistory(*map(tuple, lists)) if sound and len(lists[0]) == len(lists[1]) else SpikeHistory()


@dataclass(frozen=True)
class TrainState:
    """Progress of a run. Noise and sample order are functions of it, so no generator state exists.

    Attributes:
        iteration: optimizer steps done.
        spikes: what a step is compared with, with --spike-window.
        expert_fractions_LE: share of routed tokens per MoE layer and expert in the last step; uniform at the start.
            While steps vote for the owners of a pool's experts, the mean over those so far.
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
            **({"spike_history": asdict(self.spikes)} if self.spikes.losses else {}),
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
