"""Causal attention over sequences that are split over context-parallel ranks: keys and values go round the ring of them.

A rank holds chunks r and 2 n - 1 - r of 2 n of each sequence (parallel_state/token_share.py). In step i it has the keys and
values of rank j = r - i, and sends them on while it computes. Each step but the first has half the scores of the square of
a rank's tokens, on every rank:

    j = r    its own keys                          causal: both chunks are in order
    j < r    all queries, the first chunk of keys   the second chunk is after all of them
    j > r    the second chunk of queries, all keys  the first chunk is before all of them

Results are merged by their log-sum-exps (Ring Attention, arXiv:2310.01889). The backward pass sends keys and values round
again, and their gradients with them, in fp32, one step behind: after n steps these are home.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.ops.attention_pieces import attention_piece, attention_piece_backward, merge
from megatron_samoe.parallel_state.state import Group, PendingShift


def ring_attention(q_BASD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, cp: Group, scale: float | None = None) -> Tensor:
    """Returns y_BASD of the rank's part of sequences, S tokens of each; all ranks of the group call it together.

    Args:
        scale: factor on products of queries and keys; 1 / sqrt(D) if None.
    """
    scale = 1.0 / math.sqrt(q_BASD.shape[-1]) if scale is None else scale
    return _RingAttention.apply(q_BASD, k_BGSD, v_BGSD, cp, scale)


def _piece(source: int, rank: int, length: int) -> tuple[slice, slice, bool]:
    """Returns the queries of `rank` and the keys of `source` that have scores, and whether causally; each has `length` tokens."""
    half, everything = length // 2, slice(0, length)
    if source == rank:
        return everything, everything, True
    return (everything, slice(0, half), False) if source < rank else (slice(half, length), everything, False)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cp: Group, scale: float) -> Tensor:  # type: ignore[override]
        arriving: PendingShift | None = None
        own = kv = torch.stack((k, v))
        y = lse = q  # the first piece, of the rank's own keys, replaces them
        for step in range(cp.size):
            kv = kv if arriving is None else arriving.wait()
            arriving = cp.start_shift(kv) if step + 1 < cp.size else None
            queries, keys, is_causal = _piece((cp.rank - step) % cp.size, cp.rank, q.shape[2])
            k, v = kv[:, :, :, keys]
            more, more_lse = attention_piece(q[:, :, queries], k, v, is_causal, scale)
            if step == 0:
                y, lse = more.to(more_lse.dtype), more_lse
            else:
                merge(y[:, :, queries], lse[:, :, queries], more, more_lse)
        y = y.to(q.dtype)
        ctx.save_for_backward(q, own, y, lse)
        ctx.cp, ctx.scale = cp, scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, kv, y, lse = ctx.saved_tensors
        cp, scale = ctx.cp, ctx.scale
        arriving: PendingShift | None = None
        gradients: PendingShift | None = None
        dq, dkv = torch.zeros_like(q, dtype=lse.dtype), torch.zeros_like(kv, dtype=lse.dtype)
        for step in range(cp.size):
            kv = kv if arriving is None else arriving.wait()
            arriving = cp.start_shift(kv) if step + 1 < cp.size else None
            queries, keys, is_causal = _piece((cp.rank - step) % cp.size, cp.rank, q.shape[2])
            k, v = kv[:, :, :, keys]
            dq_part, dk_part, dv_part = attention_piece_backward(
                dy[:, :, queries], q[:, :, queries], k, v, y[:, :, queries], lse[:, :, queries], is_causal, scale
            )
            dq[:, :, queries] += dq_part
            dkv = dkv if gradients is None else gradients.wait()
            dkv[0, :, :, keys] += dk_part
            dkv[1, :, :, keys] += dv_part
            gradients = cp.start_shift(dkv)
        assert gradients is not None
        dk, dv = gradients.wait().to(kv.dtype)
        return dq.to(q.dtype), dk, dv, None, None
