"""Attention over ranks that each hold a part of every sequence."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.config import ParallelConfig
from megatron_samoe.ops.attention import PLAIN, attention
from megatron_samoe.tensor_parallel.mappings import to_heads, to_sequences
from megatron_samoe.tensor_parallel.ring_attention import ring_attention
from tools.benchmarks.harness import (
    DTYPES,
    Dtype,
    Row,
    Rows,
    TableBenchmark,
    medians_of,
    milliseconds,
    ratios_of_rounds,
)
from tools.benchmarks.ranks import make_parallel, run_ranks, together


@dataclass(frozen=True, kw_only=True)
class RingAttention(TableBenchmark):
    """attention over sequences split over ranks, against local attention

        ring     keys and values go round (--cp-comm-type p2p)
        heads    each rank gets whole sequences of some heads, and gives all heads back (a2a)
        local    each rank has whole sequences of as many heads from the start: as many products, and nothing sent

    Forward and backward, on all ranks at once, one thread each. "ring / local" and "heads / local" are medians over rounds
    of the time over local attention's in the same round: 1 is no cost.
    """

    name = "ring-attention"

    seq_length: int = 4096
    num_heads: int = 8
    head_dim: int = 64
    ranks: tuple[int, ...] = (2,)
    dtype: tuple[Dtype, ...] = ("fp32", "bf16")

    def rows(self) -> Rows:
        return [row for ranks in self.ranks for row in run_ranks(self._on_rank, ranks, ranks)]

    def _on_rank(self, ranks: int) -> Rows:
        cp = make_parallel(ParallelConfig(context_parallel_size=ranks)).cp
        return [self._row(dtype, cp) for dtype in self.dtype]

    def _row(self, dtype: str, cp: Any) -> Row:
        def both_ways(attend: Callable[..., Tensor], num_heads: int, tokens: int) -> Callable[[], object]:
            shape = (1, tokens, num_heads, self.head_dim)  # as projections leave them
            inputs = [torch.randn(shape).to(DTYPES[dtype]).transpose(1, 2).requires_grad_() for _ in range(3)]
            ones = torch.ones(shape, dtype=DTYPES[dtype]).transpose(1, 2)
            return lambda: torch.autograd.grad(attend(*inputs), inputs, ones)

        def by_heads(*inputs: Tensor) -> Tensor:
            q, k, v = (to_heads(t.transpose(1, 2), cp).transpose(1, 2) for t in inputs)
            return to_sequences(attention(q, k, v, PLAIN).transpose(1, 2), cp).transpose(1, 2)

        heads, length = self.num_heads, self.seq_length
        variants = {
            "ring": both_ways(partial(ring_attention, cp=cp), heads, length // cp.size),
            "heads": both_ways(by_heads, heads, length // cp.size),
            "local": both_ways(partial(attention, rule=PLAIN), heads // cp.size, length),
        }
        times = together(variants, self.rounds)
        row: Row = {"ranks": cp.size, "dtype": dtype, **milliseconds(medians_of(times), 1)}
        for name in ("ring", "heads"):
            row[f"{name} / local"] = round(statistics.median(ratios_of_rounds(times, name, "local")), 3)
        return row
