"""An attention: queries look at the last WINDOW tokens alone (Longformer, arXiv:2004.05150)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_samoe.models.attention import AttentionInputs, SelfAttention
from megatron_samoe.moe.types import ForwardContext

WINDOW = 5


class SlidingWindowAttention(SelfAttention):
    """Self-attention with a band for its mask."""

    def core(
        self, q_BSAD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, inputs: AttentionInputs, context: ForwardContext
    ) -> Tensor:
        """Returns attention's output under the band; the core adds the documents' mask where there are any."""
        places = torch.arange(q_BSAD.shape[1], device=q_BSAD.device)
        distance_SS = places[:, None] - places[None, :]
        mask_B1SS = ((distance_SS >= 0) & (distance_SS < WINDOW))[None, None]
        return super().core(q_BSAD, k_BSGD, v_BSGD, replace(inputs, mask_B1SS=mask_B1SS), context)
