"""An optimizer: SGD whose steps are orthogonal matrices, by Newton-Schulz in fp32; AdamW for all that is no matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron_samoe.config import OptimizerConfig
from megatron_samoe.optimizer.param_groups import ParamRule, default_rules

MATRICES = r"\.(qkv|output|fc1|fc2)\.weight$|(experts|bank)\.w[12]$"


@dataclass(frozen=True)
class OrthogonalSGD:
    """See `optimizer.update.Update`."""

    momentum: float = 0.9
    iterations: int = 8
    moments = ("momentum",)
    needs_whole = True

    def accumulate(self, grad: Tensor, moments: Mapping[str, Tensor], step: int) -> Tensor:
        """Returns the momentum."""
        return moments["momentum"].mul_(self.momentum).add_(grad)

    def direction(self, step: Tensor, num_stacked: int) -> Tensor:
        """Returns the orthogonal matrix nearest to each matrix, of which experts and banks are stacks."""
        x = step.flatten(num_stacked, -2)
        x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-20)
        for _ in range(self.iterations):
            x = 1.5 * x - 0.5 * (x @ x.mT) @ x
        return x.view_as(step)


def rules(config: OptimizerConfig) -> tuple[ParamRule, ...]:
    """Returns the package's rules, with another for matrices before them."""
    return (ParamRule(MATRICES, lr_mult=2.0, update=OrthogonalSGD()), *default_rules(config))
