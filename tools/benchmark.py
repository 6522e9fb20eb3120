#!/usr/bin/env python3
"""Measures speed against limits taken in the same run: `benchmark.py moe-layer`, `benchmark.py train-step`.

Each figure is a median over rounds in which all variants run in turn, so that other load on the machine meets them
alike. Only ratios of one run count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megatron_samoe.config import ModelConfig, MoEConfig, PretrainConfig, TrainingConfig
from megatron_samoe.distributed.grad_buffer import GradBuffers
from megatron_samoe.evaluation.run_summary import format_table
from megatron_samoe.models.accounting import count_parameters, train_flops_per_token
from megatron_samoe.models.initialize import initialize_parameters
from megatron_samoe.models.transformer_layer import expert_shape
from megatron_samoe.moe.moe_layer import MoELayer
from megatron_samoe.moe.types import ForwardContext
from megatron_samoe.ops import extension
from megatron_samoe.parallel_state import backend, single_process_state
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import train_step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def alternate(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Returns the median seconds of each variant; a first round warms up and is not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def moe_layer(options: argparse.Namespace) -> list[dict[str, object]]:
    """An MoE layer, forward and backward with all gradients, against products of the same size.

    "products" are the layer's expert products alone, an expert at a time; "dense" are the six products of one dense MLP
    with as many rows: the machine's ceiling for this shape.
    """
    results = []
    for experts in options.num_experts:
        for activation in options.activation:
            for dtype_name in options.dtype:
                results.append(_one_moe_layer(options, experts, activation, dtype_name))
    return results


def _one_moe_layer(options: argparse.Namespace, experts: int, activation: str, dtype_name: str) -> dict[str, object]:
    tokens, hidden, ffn, topk = options.tokens, options.hidden_size, options.ffn_hidden_size, options.topk
    dtype, gated = DTYPES[dtype_name], activation == "swiglu"
    config = PretrainConfig(
        model=ModelConfig(hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=8, swiglu=gated,
                          disable_bias_linear=gated),
        moe=MoEConfig(expert_layout="moe", num_experts=experts, moe_router_topk=topk),
    )  # fmt: skip
    state = single_process_state()
    layer = MoELayer(
        config.moe, expert_shape(config), init_std=0.02, output_init_std=0.02, layer=0, moe_index=0, num_moe_layers=1,
        shared_expert=None, state=state, dtype=dtype,
    )  # fmt: skip
    parameters = dict(layer.named_parameters())
    initialize_parameters(parameters, state, seed=1)
    GradBuffers(parameters, state)
    x_TH = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    dy_TH = torch.randn(tokens, hidden, dtype=dtype)
    context = ForwardContext(
        1, training=True, tokens_per_step=tokens, expert_fractions_LE=torch.full((1, experts), 1 / experts)
    )

    def run_layer() -> None:
        y_TH, _ = layer(x_TH, context, None)
        torch.autograd.backward(y_TH, dy_TH)
        x_TH.grad = None

    rows = _split_evenly(tokens * topk, experts)
    width = 2 * ffn if gated else ffn
    medians = alternate(
        {
            "layer": run_layer,
            "products": _products(rows, hidden, width, ffn, dtype),
            "dense": _products([tokens * topk], hidden, width, ffn, dtype),
        },
        options.rounds,
    )
    flops = 3 * 2 * tokens * topk * hidden * (width + ffn)
    return {
        "experts": experts, "activation": activation, "dtype": dtype_name, "topk": topk,
        **{f"{name}_gflop_s": flops / seconds / 1e9 for name, seconds in medians.items()},
        "share_of_products": medians["products"] / medians["layer"],
        "share_of_dense": medians["dense"] / medians["layer"],
    }  # fmt: skip


def _split_evenly(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


def _products(rows: list[int], hidden: int, width: int, ffn: int, dtype: torch.dtype) -> Callable[[], None]:
    """Returns a run of an MLP's six products per expert, into tensors that exist."""
    work = []
    for n in rows:
        a, b = torch.randn(n, hidden, dtype=dtype), torch.randn(width, hidden, dtype=dtype)
        c, d = torch.randn(n, width, dtype=dtype), torch.randn(hidden, ffn, dtype=dtype)
        e, y = torch.randn(n, ffn, dtype=dtype), torch.randn(n, hidden, dtype=dtype)
        work += [(a, b.t(), c.clone()), (e, d.t(), y.clone()), (y, d, e.clone()), (c, b, a.clone())]
        work += [(y.t(), e, d.clone()), (c.t(), a, b.clone())]

    def run() -> None:
        for left, right, out in work:
            torch.mm(left, right, out=out)

    return run


def train_steps(options: argparse.Namespace) -> list[dict[str, object]]:
    """Whole optimizer steps of dense, MoE and SaMoE models with equal active parameters."""
    variants, flops, counts = {}, {}, {}
    for layout in options.layouts:
        dtype = options.dtype[0]
        config = PretrainConfig(
            model=ModelConfig(num_layers=options.num_layers, hidden_size=options.hidden_size,
                              ffn_hidden_size=options.ffn_hidden_size, num_attention_heads=options.hidden_size // 64,
                              seq_length=options.seq_length),
            moe=MoEConfig(expert_layout=layout, num_experts=options.num_experts[0], moe_router_topk=options.topk),
            training=TrainingConfig(micro_batch_size=options.micro_batch_size,
                                    global_batch_size=options.micro_batch_size * options.num_micro_batches,
                                    bf16=dtype == "bf16"),
        )  # fmt: skip
        if layout == "samoe":
            config = replace(config, moe=replace(config.moe, num_expert_banks=max(1, options.num_layers // 4)))
        setup = build_setup(config, options.vocab_size, single_process_state())
        shape = (options.micro_batch_size, options.seq_length)
        batch = {
            "tokens": torch.randint(options.vocab_size, shape),
            "labels": torch.randint(options.vocab_size, shape),
            "loss_mask": torch.ones(shape),
        }
        state = initial_state(setup)
        variants[layout] = lambda s=setup, st=state, b=batch: train_step(s, st, [b] * options.num_micro_batches)
        flops[layout] = train_flops_per_token(config, options.vocab_size)
        counts[layout] = count_parameters(config, options.vocab_size)
    tokens = options.micro_batch_size * options.num_micro_batches * options.seq_length
    ffn = options.ffn_hidden_size
    rows = options.micro_batch_size * options.seq_length
    product_flops = 6 * 2 * rows * options.hidden_size * ffn
    variants["dense products"] = _products([rows], options.hidden_size, ffn, ffn, DTYPES[options.dtype[0]])
    medians = alternate(variants, options.rounds)
    ceiling = product_flops / medians.pop("dense products")
    return [
        {
            "layout": layout, "parameters": counts[layout].total, "active": counts[layout].active,
            "tokens_per_s": tokens / seconds, "gflop_s": tokens / seconds * flops[layout] / 1e9,
            "share_of_dense_products": tokens / seconds * flops[layout] / ceiling,
            "relative_to_first": medians[options.layouts[0]] / seconds,
        }
        for layout, seconds in medians.items()
    ]  # fmt: skip


def arguments() -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    layer = commands.add_parser("moe-layer", help="one MoE layer, forward and backward")
    layer.set_defaults(run=moe_layer)
    layer.add_argument("--tokens", type=int, default=4096)
    layer.add_argument("--activation", nargs="+", choices=["gelu", "swiglu"], default=["gelu"])
    step = commands.add_parser("train-step", help="optimizer steps of whole models")
    step.set_defaults(run=train_steps)
    step.add_argument("--layouts", nargs="+", choices=["dense", "moe", "samoe"], default=["dense", "moe", "samoe"])
    step.add_argument("--num-layers", type=int, default=8)
    step.add_argument("--seq-length", type=int, default=256)
    step.add_argument("--micro-batch-size", type=int, default=8)
    step.add_argument("--num-micro-batches", type=int, default=1)
    step.add_argument("--vocab-size", type=int, default=8192)
    for command, hidden, ffn, experts in ((layer, 512, 2048, 8), (step, 384, 1536, 16)):
        command.add_argument("--hidden-size", type=int, default=hidden)
        command.add_argument("--ffn-hidden-size", type=int, default=ffn)
        command.add_argument("--num-experts", type=int, nargs="+", default=[experts])
        command.add_argument("--topk", type=int, default=1)
        command.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32"])
        command.add_argument("--rounds", type=int, default=7, help="counted rounds; medians are reported")
        command.add_argument("--threads", type=int, help="default: all cores")
        command.add_argument("--json", type=Path, help="also write the results there")
    return parser.parse_args()


def main() -> None:
    """Runs one benchmark and prints its table."""
    options = arguments()
    backend.keep_freed_memory()
    threads = backend.set_num_threads(options.threads)
    torch.manual_seed(1)
    results = options.run(options)
    rows = [list(results[0])]
    rows += [
        [f"{v:,.2f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v) for v in r.values()]
        for r in results
    ]
    print(f"{threads} threads, torch {torch.__version__}, extension {'yes' if extension.available() else 'no'}\n")
    print(format_table(rows))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
