"""Whether routers use their experts: what is said of every logged step, and a warning where they stay collapsed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.log import logger
from megatron_samoe.optimizer.schedule import warmup_iters

#: A layer whose load entropy stays below this for so many steps after warm-up is warned of.
LOW_ENTROPY, PATIENCE_STEPS = 0.5, 20


def load_entropy(counts_E: Tensor) -> float:
    """Returns the entropy of a layer's experts' shares of assignments, over log E: 1 is even, 0 one expert."""
    if len(counts_E) == 1:
        return 1.0
    shares_E = counts_E.double() / counts_E.sum().clamp_min(1)
    return (shares_E.xlogy(shares_E).sum().abs() / math.log(len(counts_E))).item()


@dataclass(frozen=True)
class RouterHealth:
    """How evenly all layers' experts were used in a step.

    Attributes:
        load_entropy: of each MoE layer, see `load_entropy`.
        largest_expert_share: share of a layer's tokens that chose its fullest expert, the largest of any layer.
        idle_experts: experts of all layers without a token.
        dropped_fraction: share of routed tokens that found no place.
    """

    load_entropy: list[float]
    largest_expert_share: float
    idle_experts: int
    dropped_fraction: float

    @property
    def least_load_entropy(self) -> float:
        """The least load entropy of any layer."""
        return min(self.load_entropy)

    @staticmethod
    def of(counts: Sequence[Tensor], num_tokens: int, num_dropped: float) -> RouterHealth:
        """Returns the health of a global batch of so many tokens, from counts_E of each layer."""
        together = torch.cat(list(counts))
        return RouterHealth(
            [load_entropy(counts_E) for counts_E in counts], float(together.max()) / num_tokens,
            int((together == 0).sum()), num_dropped / max(float(together.sum()), 1.0),
        )  # fmt: skip


class RouterWatch:
    """Warns once when a layer's load entropy stays low after warm-up, and again if it recovers and falls anew."""

    def __init__(self, config: PretrainConfig):
        self.config = config
        self.first_step = warmup_iters(config.optimizer, config.training.train_iters)
        self.low_steps: dict[int, int] = {}

    def step(self, iteration: int, health: RouterHealth) -> None:
        """Takes in the health of the step that ended with `iteration` steps done."""
        if iteration <= self.first_step:
            return
        low = {layer for layer, entropy in enumerate(health.load_entropy) if entropy < LOW_ENTROPY}
        self.low_steps = {layer: self.low_steps.get(layer, 0) + 1 for layer in low}
        due = [layer for layer, steps in sorted(self.low_steps.items()) if steps == PATIENCE_STEPS]
        if due:
            named = ", ".join(f"{layer} ({health.load_entropy[layer]:.2f})" for layer in due)
            logger.warning(
                f"iteration {iteration}: the routers of MoE layers {named} have sent most tokens to few experts for "
                f"{PATIENCE_STEPS} steps (load entropy under {LOW_ENTROPY}; 1 is even). Try {self._advice()}."
            )

    def _advice(self) -> str:
        moe = self.config.moe
        advice = []
        if moe.moe_router_load_balancing_type == "none" or moe.moe_aux_loss_coeff == 0:
            advice.append("--moe-router-load-balancing-type seq_aux_loss with --moe-aux-loss-coeff 0.01")
        else:
            advice.append(f"a larger --moe-aux-loss-coeff (now {moe.moe_aux_loss_coeff:g})")
        if moe.moe_router_topk == 1:
            advice.append("--moe-router-topk 2 with experts of half the width")
        if moe.moe_z_loss_coeff == 0:
            advice.append("--moe-z-loss-coeff 0.001")
        return ", ".join([*advice, "a longer warm-up or a lower --lr"])
