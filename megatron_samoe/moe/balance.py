"""Strategies that keep experts evenly loaded, and the losses they add, defined so that no layout changes them.

Another loss is another `BalanceStrategy`, or a term in `AuxiliaryLosses`, which models get by default;
`moe_router_load_balancing_type` of `config/moe.py` chooses among its losses. `set_loads.py` has the loss of a set that
several layers share.

The balance loss is Switch Transformer's (arXiv:2101.03961, equation 4), E * sum_e f_e s_e over a group of sequences, with
f_e the share of the group's routed tokens that expert e takes and s_e its mean score. f_e is always that of the tokens
whose gradient it weighs. Loads of an earlier step would not do: all tokens move to the expert that was empty then, and
routers swing from expert to expert. So a group is within what is computed at the same time: a sequence, or several
consecutive ones of the micro-batches that data-parallel ranks have in hand.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.moe.scores import score_of
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.ops.topk_gate import GateResult
from megatron_samoe.parallel_state.state import Group

#: Replaces a share of 0, which has no logarithm.
_TINY = 1e-30


class BalanceStrategy(Protocol):
    """Looks at what the router of one layer chose; made with the configuration and the data-parallel group.

    Attributes:
        statistics: how many numbers each sum has that it returns, by name.
    """

    statistics: Mapping[str, int]

    def __call__(self, gate: GateResult, context: ForwardContext) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Returns a loss to add to the training loss, or None, and sums over the micro-batch, detached."""


class AuxiliaryLosses:
    """The balance loss and the z-loss (ST-MoE, arXiv:2202.08906, equation 5); see `BalanceStrategy`."""

    statistics: Mapping[str, int] = {"balance": 1}

    def __init__(self, config: MoEConfig, dp: Group):
        self._config, self._topk, self._dp = config, score_of(config).topk, dp

    def __call__(self, gate: GateResult, context: ForwardContext) -> tuple[Tensor | None, dict[str, Tensor]]:
        """See `BalanceStrategy`; "balance" is the sum over sequences of E * sum_e f_e s_e."""
        group_size = self._config.balance_group_size if context.training else 1
        balance = balance_sum(gate, self._topk, group_size, self._dp)
        loss = auxiliary_loss(gate, balance, self._config, context) if context.training else None
        return loss, {"balance": balance.detach()}


def balance_sum(gate: GateResult, topk: int, group_size: int, dp: Group) -> Tensor:
    """Returns the sum over this rank's sequences of E * sum_e f_e s_e, s within the sequence, f within its group.

    Summed over a group's sequences this is group_size times the group's own E * sum_e f_e s_e.

    Args:
        gate: of complete sequences; its sums have a row for each.
        topk: experts that a token visits, on average.
        group_size: sequences balanced together; divides those of all data-parallel ranks.
        dp: ranks that hold the other sequences. All call this together where a group does not lie within one rank.
    """
    num_sequences, num_experts = gate.counts_GE.shape
    num_tokens = len(gate.ids_TK)
    tokens = max(num_tokens // max(num_sequences, 1), 1)
    counts_BE = _group_sums(gate.counts_GE, group_size, dp)
    share = num_experts / (tokens * group_size * tokens * topk)
    return (counts_BE * gate.score_sum_GE).sum() * share


def entropy_sum(score_sum_BE: Tensor, target: float, group_size: int, dp: Group) -> Tensor:
    """Returns the sum over this rank's sequences of (H - log target)^2, H the entropy of the mean scores of a sequence's group.

    UniPool's entropy loss (arXiv:2605.06665). Summed over a group's sequences this is group_size times the group's own.

    Args:
        score_sum_BE: each sequence's summed scores.
        target: experts that a layer is to use.
        group_size, dp: as in `balance_sum`.
    """
    own_BE = score_sum_BE.detach()
    # A rank's rows represent complete groups, whose other rows may be elsewhere: each moves the entropies of all rows of its group.
    sums_BE = _group_sums(own_BE, group_size, dp) + group_size * (score_sum_BE - own_BE)
    shares_BE = sums_BE / sums_BE.sum(1, keepdim=True).clamp_min(_TINY)
    entropy_B = -(shares_BE * shares_BE.clamp_min(_TINY).log()).sum(1)
    return (entropy_B - math.log(target)).square().sum()


def _group_sums(rows_BE: Tensor, group_size: int, dp: Group) -> Tensor:
    """Returns for each of this rank's sequences the sum of its group's rows."""
    if group_size == 1:
        return rows_BE
    batch, num_experts = rows_BE.shape
    first, rows_of_all = 0, rows_BE
    if batch % group_size:
        # Micro-batches of data-parallel ranks follow each other in the global batch (training/train_step.py).
        first = dp.rank * batch
        rows_of_all = rows_BE.new_zeros(dp.size * batch, num_experts)
        rows_of_all[first : first + batch] = rows_BE
        dp.all_reduce(rows_of_all)
    sums_GE = rows_of_all.view(-1, group_size, num_experts).sum(1)
    return sums_GE.repeat_interleave(group_size, 0)[first : first + batch]


def auxiliary_loss(gate: GateResult, balance: Tensor, config: MoEConfig, context: ForwardContext) -> Tensor | None:
    """Returns this micro-batch's share of a layer's balance and z-losses, already weighted; None without any.

    Shares of all micro-batches and data-parallel ranks add up to the losses of the global batch.
    """
    terms = []
    if config.moe_router_load_balancing_type != "none" and config.moe_aux_loss_coeff > 0:
        tokens_per_sequence = gate.ids_TK.shape[0] // context.batch_size
        terms.append(config.moe_aux_loss_coeff * tokens_per_sequence / context.tokens_per_step * balance)
    if config.moe_z_loss_coeff > 0:
        terms.append(config.moe_z_loss_coeff / context.tokens_per_step * gate.z_sum)
    return functools.reduce(torch.add, terms) if terms else None


def attach_loss(x: Tensor, loss: Tensor, gradient_scale: float) -> Tensor:
    """Returns x; in the backward pass `loss` gets the gradient that adding it to the training loss would give."""
    return _AttachLoss.apply(x, loss, gradient_scale)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, gradient_scale: float) -> Tensor:
        ctx.gradient_scale, ctx.like = gradient_scale, loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return grad, torch.full_like(ctx.like, ctx.gradient_scale), None
