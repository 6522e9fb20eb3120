"""A balance strategy: the squared deviation of mean scores from even ones, with a statistic of its own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_samoe.config import MoEConfig
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.ops.topk_gate import GateResult
from megatron_samoe.parallel_state import Group


class EvenScores:
    """Adds coefficient * E * sum_e (s_e - 1/E)^2 for each sequence, s_e its mean score; see `BalanceStrategy`."""

    statistics: Mapping[str, int] = {"score_deviation": 1}

    def __init__(self, config: MoEConfig, dp: Group):
        self._coefficient = config.moe_aux_loss_coeff

    def __call__(self, gate: GateResult, context: ForwardContext) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Returns the loss, as its share of the global batch's, and the sums."""
        tokens, experts = gate.ids_TK.shape[0] // context.batch_size, gate.counts_GE.shape[1]
        deviation = experts * (gate.score_sum_GE / tokens - 1 / experts).square().sum()
        sums = {"score_deviation": deviation.detach() * tokens}
        if not context.training:
            return None, sums
        return self._coefficient * tokens / context.tokens_per_step * deviation, sums
