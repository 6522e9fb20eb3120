"""`benchmark.py expert-parallel`: a layer whose experts lie on several ranks against the same one that sends nothing."""

from __future__ import annotations

from typing import Any

import torch

from megatron_samoe.benchmarks.common import DTYPES, Rows, add_command, add_options, add_sizes, in_turn, medians_of
from megatron_samoe.benchmarks.layer import make_layer
from megatron_samoe.benchmarks.ranks import make_parallel, run_ranks, synchronized
from megatron_samoe.cli.arguments import Options
from megatron_samoe.config import ParallelConfig
from megatron_samoe.parallel_state import single_process_state


def _measure(options: Options) -> Rows:
    torch.manual_seed(1)
    parallel = make_parallel(
        ParallelConfig(expert_model_parallel_size=options.ranks, moe_all_to_all_backend=options.exchange)
    )
    rows = []
    for dtype in options.dtype:
        for experts in options.num_experts:
            arguments = options.topk, options.activation, DTYPES[dtype]
            variants = {"expert parallel": make_layer(options, experts, *arguments, parallel)}
            if options.chunks > 1:
                name = f"in {options.chunks} parts"
                variants[name] = make_layer(options, experts, *arguments, parallel, options.chunks)
            # Each rank's experts get its own tokens: the same products without any exchange.
            variants["alone"] = make_layer(options, experts // options.ranks, *arguments, single_process_state())
            medians = medians_of(in_turn(variants, options.rounds, synchronized))
            rows.append({
                "ranks": options.ranks, "experts": experts, "dtype": dtype,
                **{f"{name} ms": round(seconds * 1e3, 2) for name, seconds in medians.items()},
                **{f"{name} / alone": round(medians["alone"] / seconds, 3)
                   for name, seconds in medians.items() if name != "alone"},
            })  # fmt: skip
    return rows


def run(options: Options) -> Rows:
    """A layer, forward and backward, one thread a rank; tokens are of each rank."""
    rows: Rows = run_ranks(_measure, options.ranks, options)
    return rows


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    add = add_command(commands, "expert-parallel", "a layer over several ranks against one that sends nothing", run)
    add("--ranks", 2)
    add("--num-experts", [8, 32])
    add("--exchange", ("auto", "torch", "extension"), "what carries the rows")
    add("--chunks", 1, "measure --moe-dispatch-chunks of this number as well")
    add("--activation", ("gelu", "swiglu"))
    add("--dtype", [tuple(DTYPES)], default=["fp32"])
    add_sizes(add, tokens=2048, hidden_size=512, ffn_hidden_size=2048, topk=1)
    add_options(add, ranks=True)
