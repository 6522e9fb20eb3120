"""A warning where coefficients have turned a layer's experts off."""

from __future__ import annotations

from torch import Tensor

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.log import logger
from megatron_samoe.training.hook import Hook, Record, Training
from megatron_samoe.training.hooks.moe_diagnostics import gathered_coefficients
from megatron_samoe.training.train_step import StepResult

#: A layer whose coefficients are below this share of the largest layer's says next to nothing.
LEAST_SHARE = 0.05


class CoefficientWatch(Hook):
    """Warns once of each layer whose coefficients are next to nothing, and again if they recover and fall anew."""

    def __init__(self, config: MoEConfig):
        self.config = config
        self.is_off: set[tuple[int, int]] = set()

    def contribute(self, run: Training, result: StepResult, record: Record) -> None:
        """Looks at the coefficients of a recorded step; the record stays as it is."""
        a_L2GP = gathered_coefficients(run.setup)
        if run.setup.parallel.rank == 0:
            self.look(run.state.iteration, a_L2GP)

    def look(self, iteration: int, a_L2GP: Tensor) -> None:
        """Records the coefficients after a step, zeros for layers without."""
        size_L2 = a_L2GP.square().sum(-1).mean(-1).sqrt()
        is_off_L2 = (size_L2 > 0) & (size_L2 < LEAST_SHARE * size_L2.amax(0))
        off = {(int(layer), int(row)) for layer, row in is_off_L2.nonzero()}
        new, self.is_off = sorted(off - self.is_off), off
        if new:
            named = ", ".join(f"{layer} (w{row + 1}: {float(size_L2[layer, row]):.2g})" for layer, row in new)
            advice = "--samoe-normalization l2, or " if self.config.has_pool else ""
            logger.warning(
                f"iteration {iteration}: the coefficients of MoE layers {named} are under {LEAST_SHARE} of the largest "
                f"layer's ({', '.join(f'w{row + 1}: {float(m):.2g}' for row, m in enumerate(size_L2.amax(0)))}), so their "
                f"experts say next to nothing. Try {advice}--samoe-coefficient-lr-mult 0.1."
            )
