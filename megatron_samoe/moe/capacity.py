"""Expert capacity: `drop_over_capacity` drops the choices of tokens whose expert is full, while training.

Capacity counts within one sequence (GShard's group, arXiv:2006.16668, section 2.2), so that which token is dropped does
not depend on how sequences are spread over micro-batches and ranks.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


def expert_capacity(slots_per_sequence: int, num_experts: int, factor: float) -> int:
    """Returns the most tokens of one sequence that one expert takes: ceil(factor * S * K / E), at least 1."""
    return max(1, math.ceil(factor * slots_per_sequence / num_experts))


def drop_over_capacity(
    ids_TK: Tensor,
    probs_TK: Tensor,
    capacity: int,
    batch_size: int,
    num_experts: int,
    policy: Literal["probs", "position"],
) -> Tensor:
    """Returns ids_TK with -1 where a token is over its expert's capacity; ids of -1 stay and take no capacity.

    Experts keep their most probable tokens, or the first ones (all first choices before all second choices).
    """
    num_tokens, topk = ids_TK.shape
    sequence_T = torch.arange(num_tokens, device=ids_TK.device).div(num_tokens // batch_size, rounding_mode="floor")
    num_queues = batch_size * num_experts
    queue_TK = (ids_TK + num_experts * sequence_T[:, None]).masked_fill(ids_TK < 0, num_queues)
    queue_N = queue_TK.t().flatten()
    if policy == "probs":
        order_N = probs_TK.detach().t().flatten().argsort(descending=True, stable=True)
        order_N = order_N[queue_N[order_N].argsort(stable=True)]
    else:
        order_N = queue_N.argsort(stable=True)
    sorted_N = queue_N[order_N]
    starts = torch.searchsorted(sorted_N, torch.arange(num_queues + 1, device=queue_N.device))
    position_N = torch.empty_like(queue_N)
    position_N[order_N] = torch.arange(queue_N.numel(), device=queue_N.device) - starts[sorted_N]
    over_TK = (position_N >= capacity).view(topk, num_tokens).t()
    return ids_TK.masked_fill(over_TK, -1)
