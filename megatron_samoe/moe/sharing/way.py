"""What a way of sharing experts is: who owns which weights, and how a layer gets its experts from them.

The rank's model asks the way for what each MoE layer owns, for what all layers share, and for a lender that hands each
layer its experts in every call; no layer keeps what is shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.moe.experts import ExpertShape
from megatron_samoe.moe.types import Experts
from megatron_samoe.parallel_state.state import ParallelState


@dataclass(frozen=True)
class SharingContext:
    """What a way is made for.

    Attributes:
        shapes: of the experts of each MoE layer of the whole model.
        layers_of_stage: indices, among MoE layers, of those that each pipeline stage holds.
        dtype: of weights and activations.
    """

    config: MoEConfig
    shapes: tuple[ExpertShape, ...]
    layers_of_stage: tuple[tuple[int, ...], ...]
    state: ParallelState
    dtype: torch.dtype


class ExpertLender(Protocol):
    """Lends experts to layers during one optimizer step."""

    def begin_step(self) -> None:
        """Takes in the current weights; to be called whenever they have changed."""

    def experts(self, moe_index: int) -> Experts:
        """Returns the experts of an MoE layer."""

    def finish_step(self) -> None:
        """Completes this rank's gradients of what is shared, in their main gradients."""


class SharingWay(Protocol):
    """How the MoE layers of a model come by their experts. Made with a `SharingContext`."""

    def layer_part(self, moe_index: int) -> nn.Module:
        """Returns what one layer owns: its experts, or how it uses those that are shared."""

    def shared_part(self) -> nn.Module | None:
        """Returns what all layers share on this rank; its parameters are checkpointed under `expert_pool`."""

    def lender(self, layer_parts: Mapping[int, nn.Module], shared_part: nn.Module | None) -> ExpertLender:
        """Returns the lender of this rank.

        Args:
            layer_parts: by index of the MoE layer, of those on this rank; maybe none.
        """
