"""Values handed between the phases of an MoE layer, and between layers and the training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_samoe.tensor_parallel.random import SampleRandom


class KeyValueCache(Protocol):
    """Keys and values of earlier tokens, for a forward pass over the new ones only."""

    def attend(self, layer: int, q_TAD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        """Stores the new tokens' keys and values; returns attention's output over all of their sequences, [T, A * D]."""
        ...


@dataclass(frozen=True)
class ForwardContext:
    """What a forward pass needs to know besides its tokens.

    Attributes:
        batch_size: B, sequences in the micro-batch.
        training: apply dropout, jitter and expert capacity, and attach auxiliary losses.
        tokens_per_step: tokens of the global batch, by which auxiliary losses are divided.
        gradient_scale: factor on all losses (the loss scale of fp16).
        random: source of noise; required while training.
        cache: where given, the tokens continue sequences whose earlier tokens it holds.
    """

    batch_size: int
    training: bool = False
    tokens_per_step: int = 1
    gradient_scale: float = 1.0
    random: SampleRandom | None = None
    cache: KeyValueCache | None = None


@dataclass(frozen=True)
class MoEStats:
    """Sums over the micro-batch's tokens of one MoE layer, detached; sums of sums describe a global batch.

    Attributes:
        moe_index: of the layer, among all MoE layers.
        counts_E: tokens that chose each expert, before dropping.
        z_sum: sum of squared log-sum-exp of logits.
        balance: sum over sequences of E * sum_e f_e P_e, with f of the sequences that are balanced together.
        num_dropped: routed tokens over an expert's capacity.
    """

    moe_index: int
    counts_E: Tensor
    z_sum: Tensor
    balance: Tensor
    num_dropped: Tensor

    def as_row(self) -> Tensor:
        """Returns [E + 3] in fp64, so that all layers' sums travel in one tensor."""
        scalars = torch.stack((self.z_sum.double(), self.balance.double(), self.num_dropped.double()))
        return torch.cat((self.counts_E.double(), scalars))


class Experts(Protocol):
    """The experts of one layer on one rank, wherever their weights come from."""

    def __call__(self, x_RH: Tensor, rows_per_expert: list[int]) -> Tensor:
        """Returns y_RH for rows sorted by local expert; with expert tensor parallelism a part of a sum over ranks."""
        ...
