"""A way of sharing: each layer combines the banks of a pool that are nearest to it in depth, and no others.

    W[l] = sum_p A[l, p] T[p],      A[l, p] = 0 unless bank p is one of the WINDOW banks around l P / L

So early and late layers have no bank in common, as in a pool of their own, and neighbours have most.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_samoe.config.sharing_map import Way
from megatron_samoe.errors import ConfigError
from megatron_samoe.moe.sharing.coefficients import Coefficients, normalize_coefficients
from megatron_samoe.moe.sharing.combined import CombinedSharing
from megatron_samoe.moe.sharing.way import SharingContext
from megatron_samoe.parallel_state.parameter_tag import Init, set_tag, tag_of

WINDOW = 2


class NearCoefficients(Coefficients):
    """A layer's coefficients, which begin with its nearest bank and stay 0 outside its window.

    Args:
        depth: of the layer, from 0 to 1.
    """

    def __init__(self, context: SharingContext, moe_index: int, depth: float):
        layers = context.shapes
        super().__init__(
            context.config, moe_index, len(layers), layers[moe_index].num_experts, context.state, context.dtype
        )
        banks = context.config.num_expert_banks
        nearest = min(int(depth * banks), banks - 1)
        first = min(max(nearest - WINDOW // 2, 0), banks - WINDOW)
        is_near_P = torch.zeros(banks, device=context.state.device)
        is_near_P[first : first + WINDOW] = 1
        self.register_buffer("is_near_P", is_near_P, persistent=False)
        start = Init(mean=torch.nn.functional.one_hot(torch.tensor(nearest), banks).float())
        set_tag(self.coefficients, replace(tag_of(self.coefficients), init=start))

    def normalized(self) -> Tensor:
        """Returns the weights of banks, [2, G, P]; none outside the window, which therefore gets no gradient."""
        return normalize_coefficients(self.coefficients * self.is_near_P, self._normalization)


class NearSharing(CombinedSharing):
    """See `way.SharingWay`; the banks are lent, decoded and exported as those of any pool."""

    def __init__(self, context: SharingContext):
        super().__init__(context)
        if context.config.samoe_normalization == "softmax":
            raise ConfigError(
                "--samoe-normalization",
                "softmax",
                "must be none or l2 with --expert-sharing near, whose weights outside a window are 0",
            )
        if context.config.num_expert_banks < WINDOW:
            raise ConfigError("--num-expert-banks", context.config.num_expert_banks, f"must be at least {WINDOW}")

    def layer_part(self, moe_index: int) -> NearCoefficients:
        """Returns a layer's coefficients."""
        return NearCoefficients(self._context, moe_index, (moe_index + 0.5) / len(self._context.shapes))


NEAR = Way("near", mixes=True, make=NearSharing)
