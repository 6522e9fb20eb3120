"""Auxiliary losses of the router, defined over sequences or the global batch so that no layout changes them.

The balance loss is Switch Transformer's (arXiv:2101.03961, equation 4), E * sum_e f_e P_e, with f_e the share of routed
tokens that expert e takes and P_e its mean score. Over a global batch f_e is known only when the last micro-batch has
been routed, too late for the gradient of the first; `aux_loss` therefore takes f_e of the step before. Its gradient is
then a plain sum over tokens: exact under data parallelism and gradient accumulation, with one small reduction per step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.ops.topk_gate import GateResult


def auxiliary_loss(gate: GateResult, config: MoEConfig, context: ForwardContext, moe_index: int) -> Tensor | None:
    """Returns this micro-batch's share of a layer's balance and z-losses, already weighted; None if there are none.

    Shares of all micro-batches and data-parallel ranks add up to the losses of the global batch.
    """
    kind, coefficient = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    terms = []
    if kind == "aux_loss" and coefficient > 0:
        score_sum_E = gate.score_sum_GE.sum(0)
        fractions_E = context.expert_fractions_LE
        assert fractions_E is not None, "the balance loss needs the loads of the step before"
        load_E = fractions_E[moe_index].to(score_sum_E)
        terms.append(coefficient * config.num_experts / context.tokens_per_step * (load_E @ score_sum_E))
    elif kind == "seq_aux_loss" and coefficient > 0:
        num_sequences = gate.counts_GE.shape[0]
        tokens_per_sequence = gate.ids_TK.shape[0] // num_sequences
        terms.append(coefficient * tokens_per_sequence / context.tokens_per_step * sequence_balance(gate))
    if config.moe_z_loss_coeff > 0:
        terms.append(config.moe_z_loss_coeff / context.tokens_per_step * gate.z_sum)
    return torch.stack(terms).sum() if terms else None


def sequence_balance(gate: GateResult) -> Tensor:
    """Returns the sum over sequences of E * sum_e f_e P_e, f and P taken within the sequence."""
    num_groups, num_experts = gate.counts_GE.shape
    num_tokens, topk = gate.ids_TK.shape
    tokens = max(num_tokens // num_groups, 1)
    shares_GE = gate.counts_GE.to(gate.score_sum_GE.dtype) / (tokens * topk)
    return (shares_GE * gate.score_sum_GE).sum() * (num_experts / tokens)


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
