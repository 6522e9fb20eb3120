"""Attention within documents that share a sequence, piece by piece: no tensor is as large as a sequence squared.

A piece is one document, or several short ones in a row that fill a block of queries together. Only these have a mask. On
a GPU one call of a kernel for sequences of unlike lengths takes all documents, where it has what scores need.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.ops.attention import BLOCK, ScoreRule, attention, needs_scores


@dataclass(frozen=True)
class AttentionPiece:
    """Neighbouring tokens of a sequence that attend to none outside.

    Attributes:
        mask: [sequences, 1, tokens, tokens], True where a query may attend to a key; None for one document.
    """

    num_tokens: int
    mask: Tensor | None


@dataclass(frozen=True)
class Documents:
    """The documents of a micro-batch's sequences.

    Args:
        ids_BS: on the host; a number for each token, the same for neighbours of one document.
        device: where attention runs.
    """

    ids_BS: Tensor
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @cached_property
    def lengths(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of each document, for each sequence."""
        ids_BS = self.ids_BS.cpu()
        changes_BS = ids_BS[:, 1:] != ids_BS[:, :-1]
        found = []
        for changes_S in changes_BS:
            ends = [*(changes_S.nonzero().flatten() + 1).tolist(), ids_BS.shape[1]]
            found.append(tuple(end - start for start, end in zip([0, *ends], ends, strict=False)))
        return tuple(found)

    @cached_property
    def ends(self) -> tuple[Tensor, int]:
        """Where each document ends in the micro-batch's tokens, after a 0: int32 on the device; and the longest's length."""
        flat = [length for row in self.lengths for length in row]
        ends = torch.tensor([0, *flat]).cumsum(0).to(torch.int32)
        return ends.to(self.device, non_blocking=True), max(flat)

    @cached_property
    def pieces(self) -> tuple[tuple[AttentionPiece, ...], ...]:
        """Pieces of the full micro-batch where its sequences are cut equally, else of each sequence."""
        cuts = [_cuts(row) for row in self.lengths]
        if len({tuple(size for size, _ in row) for row in cuts}) == 1:
            return (
                self._pieces(slice(None), [(row[0][0], all(one for _, one in row)) for row in zip(*cuts, strict=True)]),
            )
        return tuple(self._pieces(slice(b, b + 1), row) for b, row in enumerate(cuts))

    def _pieces(self, rows: slice, cuts: Sequence[tuple[int, bool]]) -> tuple[AttentionPiece, ...]:
        parts = self.ids_BS[rows].split([size for size, _ in cuts], 1)
        return tuple(
            AttentionPiece(size, None if one else _mask(ids).to(self.device))
            for (size, one), ids in zip(cuts, parts, strict=True)
        )

    def mask(self) -> Tensor:
        """Returns mask_B1SS of complete sequences, for what cannot go piece by piece."""
        return _mask(self.ids_BS).to(self.device)


def _mask(ids_BL: Tensor) -> Tensor:
    length = ids_BL.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=ids_BL.device).tril()
    return (causal & (ids_BL[:, :, None] == ids_BL[:, None, :]))[:, None]


def _cuts(lengths: Sequence[int]) -> list[tuple[int, bool]]:
    """Returns (tokens, whether they are one document) of the pieces of a sequence."""
    cuts: list[tuple[int, bool]] = []
    for length in lengths:
        if cuts and cuts[-1][0] + length <= BLOCK:
            cuts[-1] = (cuts[-1][0] + length, False)
        else:
            cuts.append((length, True))
    return cuts


def document_attention(
    q_BASD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, rule: ScoreRule, documents: Documents, dropout: float = 0.0
) -> Tensor:
    """Returns y_BASD of causal attention within documents; see `attention`.

    Args:
        dropout: probability by which attention weights are dropped.
    """
    if _takes_varlen(q_BASD, v_BGSD, rule, dropout):
        return _varlen(q_BASD, k_BGSD, v_BGSD, rule, documents)
    pieces = documents.pieces
    if len(pieces) == 1:
        return _by_pieces(q_BASD, k_BGSD, v_BGSD, rule, pieces[0], dropout)
    rows = zip(*(t.split(1) for t in (q_BASD, k_BGSD, v_BGSD)), pieces, strict=True)
    return torch.cat([_by_pieces(q, k, v, rule, own, dropout) for q, k, v, own in rows])


def _by_pieces(
    q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, pieces: Sequence[AttentionPiece], dropout: float
) -> Tensor:
    sizes = [piece.num_tokens for piece in pieces]
    # Splits, whose gradients are joined: a slice's would be a tensor of all of it for each piece.
    parts = zip(*(t.split(sizes, 2) for t in (q, k, v)), pieces, strict=True)
    ys = [attention(qp, kp, vp, rule, piece.mask, dropout) for qp, kp, vp, piece in parts]
    return ys[0] if len(ys) == 1 else torch.cat(ys, 2)


@lru_cache(maxsize=1)
def _varlen_kernel() -> Any:
    """Returns torch's attention over sequences of unlike lengths; None where it has none with windows and shared keys."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters) else None


def _takes_varlen(q: Tensor, v: Tensor, rule: ScoreRule, dropout: float) -> bool:
    fits = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] == v.shape[-1]
    return fits and not dropout and not needs_scores(rule) and _varlen_kernel() is not None


def _varlen(q_BASD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, rule: ScoreRule, documents: Documents) -> Tensor:
    ends, longest = documents.ends
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q_BASD, k_BGSD, v_BGSD))
    window = (-1 if rule.window is None else rule.window - 1, 0)
    more = {"window_size": window, "scale": rule.scale, "enable_gqa": q.shape[1] != k.shape[1]}
    y_TAD = _varlen_kernel()(q, k, v, ends, ends, longest, longest, **more)
    batch, heads, length, _ = q_BASD.shape
    y_BASD: Tensor = y_TAD.view(batch, length, heads, -1).transpose(1, 2)
    return y_BASD
