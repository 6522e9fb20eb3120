"""`benchmark.py expert-parallel`: a layer whose experts lie on several ranks against the same one that sends nothing."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from megatron_samoe.benchmarks.common import DTYPES, Rows, add_options
from megatron_samoe.benchmarks.layer import make_layer
from megatron_samoe.benchmarks.ranks import alternate, make_parallel, run_ranks
from megatron_samoe.config import ParallelConfig
from megatron_samoe.parallel_state import single_process_state


def _measure(options: argparse.Namespace) -> Rows:
    torch.manual_seed(1)
    parallel = make_parallel(
        ParallelConfig(expert_model_parallel_size=options.ranks, moe_all_to_all_backend=options.exchange)
    )
    rows = []
    for dtype in options.dtype:
        for experts in options.num_experts:
            arguments = options.topk, options.activation, DTYPES[dtype]
            layers = {"expert parallel": make_layer(options, experts, *arguments, parallel)}
            if options.chunks > 1:
                layers[f"in {options.chunks} parts"] = make_layer(
                    options, experts, *arguments, parallel, options.chunks
                )
            # Each rank's experts get its own tokens: the same products without any exchange.
            layers["alone"] = make_layer(options, experts // options.ranks, *arguments, single_process_state())
            variants = {name: run for name, (_layer, _gradients, run) in layers.items()}
            times = alternate(variants, options.rounds)
            medians = {name: statistics.median(values) for name, values in times.items()}
            rows.append({
                "ranks": options.ranks, "experts": experts, "dtype": dtype,
                **{f"{name} ms": round(seconds * 1e3, 2) for name, seconds in medians.items()},
                **{f"{name} / alone": round(medians["alone"] / seconds, 3)
                   for name, seconds in medians.items() if name != "alone"},
            })  # fmt: skip
    return rows


def run(options: argparse.Namespace) -> Rows:
    """A layer, forward and backward, one thread a rank; tokens are of each rank."""
    rows: Rows = run_ranks(_measure, options.ranks, options)
    return rows


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("expert-parallel", help="a layer over several ranks against one that sends nothing")
    parser.set_defaults(run=run)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--num-experts", type=int, nargs="+", default=[8, 32])
    parser.add_argument(
        "--exchange", choices=["auto", "torch", "extension"], default="auto", help="what carries the rows"
    )
    parser.add_argument("--chunks", type=int, default=1, help="measure --moe-dispatch-chunks of this number as well")
    parser.add_argument("--activation", choices=["gelu", "swiglu"], default="gelu")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32"])
    for name, size in (("tokens", 2048), ("hidden-size", 512), ("ffn-hidden-size", 2048), ("topk", 1)):
        parser.add_argument(f"--{name}", type=int, default=size)
    add_options(parser, ranks=True)
