"""A router: experts choose tokens (Zhou et al., arXiv:2202.09368), within each sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_samoe.moe.router import Router
from megatron_samoe.ops.topk_gate import GateResult, described


class ExpertChoiceRouter(Router):
    """Each expert takes the S * K / E tokens of a sequence that score it highest; a token may have 0 to E experts.

    Which tokens an expert takes depends on later tokens of the sequence, as in the paper: not for generating text.
    """

    def select(self, logits_TE: Tensor, num_sequences: int) -> GateResult:
        """Returns ids of width E, -1 where an expert did not take the token."""
        num_tokens, num_experts = logits_TE.shape
        scores_BSE = logits_TE.softmax(-1).view(num_sequences, -1, num_experts)
        capacity = num_tokens // num_sequences * self.config.moe_router_topk // num_experts
        taken = scores_BSE.topk(max(capacity, 1), dim=1).indices
        mask_TE = torch.zeros_like(scores_BSE).scatter_(1, taken, 1.0).view_as(logits_TE)
        experts_E = torch.arange(num_experts, device=logits_TE.device)
        ids_TE = torch.where(mask_TE > 0, experts_E, -1)
        return described(logits_TE, ids_TE, scores_BSE.view_as(logits_TE) * mask_TE, num_sequences)
