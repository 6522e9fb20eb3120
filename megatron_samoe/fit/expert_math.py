"""Experts as matrices of affine maps, one expert or many at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_samoe.ops.grouped_mlp import Activation, ExpertWeights, activate


def matrices(weights: ExpertWeights) -> tuple[Tensor, Tensor]:
    """Returns ([E, U, D], [E, H, C]): both matrices, a bias as the last column; U is F, or 2 F of a gated expert."""
    up = weights.w1.flatten(1, -2)
    if weights.b1 is None or weights.b2 is None:
        return up, weights.w2
    return (torch.cat((up, weights.b1.flatten(1).unsqueeze(2)), 2), torch.cat((weights.w2, weights.b2.unsqueeze(2)), 2))


def with_one(x_NK: Tensor, has_bias: bool) -> Tensor:
    """Returns rows for `matrices`: with a last column of ones where experts have biases."""
    return torch.cat((x_NK, x_NK.new_ones(*x_NK.shape[:-1], 1)), -1) if has_bias else x_NK


def hidden_of(weights: ExpertWeights, x_NH: Tensor, activation: Activation) -> Tensor:
    """Returns a_ENF: what all experts make of rows between their matrices; x is [N, H], or [E, N, H] for rows of each."""
    h_ENU = x_NH @ weights.w1.flatten(1, -2).transpose(1, 2)
    if weights.b1 is not None:
        h_ENU = h_ENU + weights.b1.flatten(1).unsqueeze(1)
    return activate(h_ENU, activation)


def output_of(weights: ExpertWeights, a_ENF: Tensor) -> Tensor:
    """Returns y_ENH of what `hidden_of` returns."""
    y_ENH = a_ENF @ weights.w2.transpose(1, 2)
    return y_ENH if weights.b2 is None else y_ENH + weights.b2.unsqueeze(1)


def chosen(weights: ExpertWeights, experts: Tensor | slice) -> ExpertWeights:
    """Returns some of the experts, in the order given."""
    return weights.map(lambda t: t[experts])
