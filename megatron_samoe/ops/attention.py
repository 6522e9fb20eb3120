"""Causal attention with what scores may have besides: a window of recent keys, a soft cap, and a sink.

Queries are taken block by block, each with the keys that its window reaches. So no tensor is as large as a sequence squared.
`reference.attention` is the reference implementation.

Letters as in CONTRIBUTING.md, and L: keys, of which the last S are the queries' own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

#: Queries of a block.
BLOCK = 512


@dataclass(frozen=True)
class ScoreRule:
    """What a query's scores have besides the product with its keys.

    Attributes:
        window: most keys that a query attends to, its own and those before it; None for all.
        softcap: c, which turns a score s into c tanh(s / c) (Gemma 2, arXiv:2408.00118).
        sinks_A: score of a key without value in each head, which takes its share of the softmax (gpt-oss).
        scale: factor on the products; 1 / sqrt(D) if None.
    """

    window: int | None = None
    softcap: float | None = None
    sinks_A: Tensor | None = None
    scale: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is causal attention and nothing else, whatever the scale."""
        return self.window is None and self.softcap is None and self.sinks_A is None

    def first_key(self, query: int) -> int:
        """Returns the first key that a query of some place attends to."""
        return 0 if self.window is None else max(0, query - self.window + 1)


PLAIN = ScoreRule()


def attention(
    q_BASD: Tensor,
    k_BGLD: Tensor,
    v_BGLD: Tensor,
    rule: ScoreRule,
    mask_B1SL: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Returns y_BASD.

    Args:
        mask_B1SL: True where a query may attend to a key, if not to all before it.
        dropout: probability by which attention weights are dropped.
    """
    length, first = k_BGLD.shape[2], k_BGLD.shape[2] - q_BASD.shape[2]
    if rule.is_plain and (first == 0 or mask_B1SL is not None):
        return _sdpa(q_BASD, k_BGLD, v_BGLD, mask_B1SL, rule.scale, dropout, is_causal=mask_B1SL is None)
    blocks = []
    for start in range(first, length, BLOCK):
        stop, low = min(start + BLOCK, length), rule.first_key(start)
        q, k, v = q_BASD[:, :, start - first : stop - first], k_BGLD[:, :, low:stop], v_BGLD[:, :, low:stop]
        mask = band(stop - start, stop - low, rule.window, q.device)
        if mask_B1SL is not None:
            mask = mask & mask_B1SL[:, :, start - first : stop - first, low:stop]
        blocks.append(_block(q, k, v, mask, rule, dropout))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)


def soft_capped(scores: Tensor, cap: float | None) -> Tensor:
    """Returns cap * tanh(scores / cap)."""
    return scores if cap is None else cap * torch.tanh(scores / cap)


def needs_scores(rule: ScoreRule) -> bool:
    """Whether scores are computed one by one, as no fused kernel has what they need."""
    return rule.softcap is not None or rule.sinks_A is not None


@lru_cache(maxsize=64)
def band(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Returns mask [queries, keys], True where a key is not after the query and in its window; both end together."""
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    mask = ones.tril(num_keys - num_queries)
    return mask if window is None else mask & ~ones.tril(num_keys - num_queries - window)


def _block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: ScoreRule, dropout: float) -> Tensor:
    if not needs_scores(rule):
        return _sdpa(q, k, v, mask, rule.scale, dropout)
    arguments = (q, k, v, mask, rule.softcap, rule.sinks_A, rule.scale, dropout)
    if not torch.is_grad_enabled() or dropout:  # a caller that drops weights draws them again itself
        return _by_scores(*arguments)
    y: Tensor = checkpoint(_by_scores, *arguments, use_reentrant=False, preserve_rng_state=False)
    return y


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, dropout: float, is_causal: bool = False
) -> Tensor:
    arguments: dict[str, Any] = {"attn_mask": mask, "is_causal": is_causal, "dropout_p": dropout, "scale": scale}
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **arguments)


def _by_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    softcap: float | None,
    sinks_A: Tensor | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """Returns y [B, A, queries, D]; scores and their softmax are in fp32 or more."""
    batch, heads, num_queries, head_dim = q.shape
    groups, wide = k.shape[1], torch.promote_types(q.dtype, torch.float32)
    q = q.reshape(batch, groups, heads // groups, num_queries, head_dim)
    scores = soft_capped((q @ k[:, :, None].mT).to(wide) * (scale or head_dim**-0.5), softcap)
    scores = scores.masked_fill(~(mask if mask.dim() == 2 else mask[:, :, None]), -torch.inf)
    if sinks_A is None:
        weights = scores.softmax(-1)
    else:
        sinks = sinks_A.to(wide).view(groups, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    y = F.dropout(weights, dropout).to(v.dtype) @ v[:, :, None]
    return y.view(batch, heads, num_queries, -1)
