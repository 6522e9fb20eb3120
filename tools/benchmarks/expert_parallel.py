"""A layer whose experts lie on several ranks against the same one that sends nothing."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import torch

from megatron_samoe.config import ParallelConfig
from megatron_samoe.parallel_state import single_process_state
from tools.benchmarks.harness import DTYPES, Dtype, Rows, TableBenchmark, medians_of, milliseconds, speed
from tools.benchmarks.layer import Activation, LayerShape, make_layer
from tools.benchmarks.ranks import make_parallel, run_ranks, together


@dataclass(frozen=True, kw_only=True)
class ExpertParallel(TableBenchmark):
    """a layer over several ranks against one that sends nothing

    Forward and backward, one thread a rank; tokens are of each rank.
    """

    name = "expert-parallel"

    ranks: int = 2
    num_experts: tuple[int, ...] = (8, 32)
    exchange: Literal["auto", "torch", "extension"] = "auto"
    """what carries the rows"""
    chunks: int = 1
    """measure --moe-dispatch-chunks of this number as well"""
    activation: Activation = "gelu"
    dtype: tuple[Dtype, ...] = ("fp32",)
    tokens: int = 2048
    hidden_size: int = 512
    ffn_hidden_size: int = 2048
    topk: int = 1

    def rows(self) -> Rows:
        rows: Rows = run_ranks(self._on_rank, self.ranks)
        return rows

    def _on_rank(self) -> Rows:
        torch.manual_seed(1)
        split = ParallelConfig(expert_model_parallel_size=self.ranks, moe_all_to_all_backend=self.exchange)
        parallel, rows = make_parallel(split), []
        for dtype, experts in itertools.product(self.dtype, self.num_experts):
            sizes = self.tokens, self.hidden_size, self.ffn_hidden_size, experts, self.topk
            shape = LayerShape(*sizes, self.activation, DTYPES[dtype])
            variants = {"expert parallel": make_layer(shape, parallel)}
            if self.chunks > 1:
                variants[f"in {self.chunks} parts"] = make_layer(shape, parallel, self.chunks)
            # Each rank's experts get its own tokens: the same products without any exchange.
            variants["alone"] = make_layer(replace(shape, num_experts=experts // self.ranks), single_process_state())
            medians = medians_of(together(variants, self.rounds))
            row = {"ranks": self.ranks, "experts": experts, "dtype": dtype, **milliseconds(medians, 2)}
            for name in medians:
                row |= speed(medians, name, "alone", digits=3) if name != "alone" else {}
            rows.append(row)
        return rows
