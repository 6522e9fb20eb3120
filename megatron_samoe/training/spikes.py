"""Steps that go wrong: a loss or a gradient norm far above those of the steps before."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_samoe.config.training import TrainingConfig


@dataclass(frozen=True)
class SpikeHistory:
    """Losses and gradient norms of the last steps, as many as --spike-window at most."""

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

    def plain(self) -> dict[str, list[float]]:
        """Returns the values for a checkpoint."""
        return {"losses": list(self.losses), "norms": list(self.norms)}

    @staticmethod
    def from_plain(values: Mapping[str, Any]) -> SpikeHistory:
        """Returns what `plain` described; empty where a checkpoint has nothing of the kind."""
        lists = [values.get(name, ()) for name in ("losses", "norms")]
        sound = all(isinstance(v, (list, tuple)) and all(type(x) is float for x in v) for v in lists)
        return SpikeHistory(*map(tuple, lists)) if sound and len(lists[0]) == len(lists[1]) else SpikeHistory()
