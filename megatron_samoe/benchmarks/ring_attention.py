"""Measures attention over ranks that each hold a part of every sequence, forward and backward.

    ring     keys and values go round (--cp-comm-type p2p)
    heads    each rank gets whole sequences of some heads, and gives all heads back (a2a)
    local    each rank has whole sequences of as many heads from the start: as many products, and nothing sent

Variants run in turn on all ranks at once, one thread each. "ring / local" and "heads / local" are medians over rounds of the
time over local attention's in the same round: 1 is no cost.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.benchmarks.common import DTYPES, Row, Rows, add_command, add_options, add_sizes, in_turn, medians_of
from megatron_samoe.benchmarks.ranks import make_parallel, run_ranks, synchronized
from megatron_samoe.cli.arguments import Options
from megatron_samoe.config import ParallelConfig
from megatron_samoe.ops.attention import PLAIN, attention
from megatron_samoe.tensor_parallel.mappings import to_heads, to_sequences
from megatron_samoe.tensor_parallel.ring_attention import ring_attention


def _both_ways(attend: Callable[..., Tensor], inputs: list[Tensor], ones: Tensor) -> None:
    torch.autograd.grad(attend(*inputs), inputs, ones)


def _times(options: Options, ranks: int) -> Rows:
    cp = make_parallel(ParallelConfig(context_parallel_size=ranks)).cp
    return [_row(options, dtype, cp) for dtype in options.dtype]


def _row(options: Options, dtype: str, cp: Any) -> Row:
    heads, length, kind = options.num_heads, options.seq_length, DTYPES[dtype]
    of_ring, of_local = (heads, length // cp.size), (heads // cp.size, length)

    def tensors(num_heads: int, tokens: int) -> tuple[list[Tensor], Tensor]:
        shape = (1, tokens, num_heads, options.head_dim)  # as projections leave them
        found = [torch.randn(shape).to(kind).transpose(1, 2).requires_grad_() for _ in range(3)]
        return found, torch.ones(shape, dtype=kind).transpose(1, 2)

    def by_heads(*inputs: Tensor) -> Tensor:
        q, k, v = (to_heads(t.transpose(1, 2), cp).transpose(1, 2) for t in inputs)
        return to_sequences(attention(q, k, v, PLAIN).transpose(1, 2), cp).transpose(1, 2)

    variants = {
        "ring": partial(_both_ways, lambda q, k, v: ring_attention(q, k, v, cp), *tensors(*of_ring)),
        "heads": partial(_both_ways, by_heads, *tensors(*of_ring)),
        "local": partial(_both_ways, lambda q, k, v: attention(q, k, v, PLAIN), *tensors(*of_local)),
    }
    times = in_turn(variants, options.rounds, synchronized)
    row: Row = {"ranks": cp.size, "dtype": dtype}
    row |= {f"{name} ms": round(seconds * 1e3, 1) for name, seconds in medians_of(times).items()}
    for name in ("ring", "heads"):
        ratios = [a / b for a, b in zip(times[name], times["local"], strict=True)]
        row[f"{name} / local"] = round(statistics.median(ratios), 3)
    return row


def run(options: Options) -> Rows:
    """Returns a row for each number of ranks and precision."""
    return [row for ranks in options.ranks for row in run_ranks(_times, ranks, options, ranks)]


def add_parser(commands: Any) -> None:
    """Adds the subcommand `ring-attention`."""
    add = add_command(
        commands,
        "ring-attention",
        "attention over sequences split over ranks, against local attention",
        run,
        description=__doc__,
    )
    add_sizes(add, seq_length=4096, num_heads=8, head_dim=64)
    add("--ranks", [2])
    add("--dtype", [tuple(DTYPES)], default=["fp32", "bf16"])
    add_options(add, ranks=True)
