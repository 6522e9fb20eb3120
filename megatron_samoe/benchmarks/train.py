"""`benchmark.py train-step`: whole optimizer steps of dense, MoE and SaMoE models with equal active parameters."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from megatron_samoe.benchmarks.common import DTYPES, Rows, add_options, alternate, process_status_kb
from megatron_samoe.benchmarks.layer import add_peer_options, products
from megatron_samoe.benchmarks.peers import running
from megatron_samoe.config import ModelConfig, MoEConfig, PretrainConfig, TrainingConfig
from megatron_samoe.parallel_state import backend, single_process_state
from megatron_samoe.planning.accounting import count_parameters, train_flops_per_token
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import train_step


def make_config(options: argparse.Namespace, layout: str, dtype: str) -> PretrainConfig:
    """Returns the model of a layout; a SaMoE has a bank for four layers."""
    config = PretrainConfig(
        model=ModelConfig(num_layers=options.num_layers, hidden_size=options.hidden_size,
                          ffn_hidden_size=options.ffn_hidden_size, num_attention_heads=options.hidden_size // 64,
                          seq_length=options.seq_length, swiglu=options.swiglu, disable_bias_linear=options.swiglu),
        moe=MoEConfig(expert_layout=layout, num_experts=options.num_experts, moe_router_topk=options.topk,
                      moe_ffn_hidden_size=options.moe_ffn_hidden_size or options.ffn_hidden_size),
        training=TrainingConfig(micro_batch_size=options.micro_batch_size,
                                global_batch_size=options.micro_batch_size * options.num_micro_batches,
                                bf16=dtype == "bf16"),
    )  # fmt: skip
    if layout == "samoe":
        banks = max(1, options.num_layers // 4)
        return replace(config, moe=replace(config.moe, num_expert_banks=banks, samoe_combine=options.samoe_combine))
    return config


def make_step(options: argparse.Namespace, layout: str, dtype: str) -> Callable[[], object]:
    """Returns a run of one optimizer step."""
    setup = build_setup(make_config(options, layout, dtype), options.vocab_size, single_process_state())
    shape = (options.micro_batch_size, options.seq_length)
    batch = {
        "tokens": torch.randint(options.vocab_size, shape),
        "labels": torch.randint(options.vocab_size, shape),
        "loss_mask": torch.ones(shape),
    }
    state = initial_state(setup)
    return lambda: train_step(setup, state, [batch] * options.num_micro_batches)


def _peak(options: argparse.Namespace, layout: str, dtype: str, answers: Any) -> None:
    backend.keep_freed_memory()
    torch.set_num_threads(torch.get_num_threads() if options.threads is None else options.threads)
    step = make_step(options, layout, dtype)
    for _ in range(2):
        step()
    # Not ru_maxrss: it begins with what the parent held.
    answers.put(process_status_kb("VmHWM") / 1024)


def peak_megabytes(options: argparse.Namespace, layout: str, dtype: str) -> float:
    """Returns the most memory that a process of its own holds over two steps."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_peak, args=(options, layout, dtype, answers))
    process.start()
    peak: float = answers.get()
    process.join()
    return peak


def run(options: argparse.Namespace) -> Rows:
    """Steps of all layouts in turn, and of peers where a folder is given; memory each in a process of its own."""
    rows = []
    for dtype in options.dtype:
        flops, counts, variants = {}, {}, {}
        for layout in options.layouts:
            config = make_config(options, layout, dtype)
            variants[layout] = make_step(options, layout, dtype)
            flops[layout] = train_flops_per_token(config, options.vocab_size)
            counts[layout] = count_parameters(config, options.vocab_size)
        tokens = options.micro_batch_size * options.num_micro_batches * options.seq_length
        micro_rows, ffn = options.micro_batch_size * options.seq_length, options.ffn_hidden_size
        variants["dense products"] = products([micro_rows], options.hidden_size, ffn, ffn, DTYPES[dtype])
        product_flops = 6 * 2 * micro_rows * options.hidden_size * ffn
        names = options.peer_names or [f"moe:grouped_mm:k={options.topk}:fused" + (":bf16" if dtype == "bf16" else "")]
        sizes = {"L": options.num_layers, "H": options.hidden_size, "F": ffn, "heads": options.hidden_size // 64,
                 "E": options.num_experts, "V": options.vocab_size, "S": options.seq_length,
                 "B": options.micro_batch_size, "threads": torch.get_num_threads()}  # fmt: skip
        script = "w2_train_step.py"
        with running(options.peers, script, names, sizes, options.peer_python, torch.get_num_threads()) as peers:
            variants.update({peer.name: peer.seconds for peer in peers})
            medians = alternate(variants, options.rounds, options.clock)
            # Not what they say: their ru_maxrss begins with what this process held.
            peer_memory = {peer.name: round(process_status_kb("VmHWM", peer.process.pid) / 1024) for peer in peers}
        ceiling = product_flops / medians.pop("dense products")
        first = medians[options.layouts[0]]
        for name, seconds in medians.items():
            count = counts.get(name)
            rows.append({
                "model": name, "dtype": dtype,
                "parameters": count.total if count else None, "active": count.active if count else None,
                "tokens:s": round(tokens / seconds, 1),
                "share_of_dense_products": round(tokens / seconds * flops[name] / ceiling, 3) if count else None,
                f"speed / {options.layouts[0]}": round(first / seconds, 3),
                "peak_mb": peer_memory.get(name) or (round(peak_megabytes(options, name, dtype)) if count else None),
            })  # fmt: skip
    return rows


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("train-step", help="optimizer steps of whole models")
    parser.set_defaults(run=run)
    parser.add_argument("--layouts", nargs="+", choices=["dense", "moe", "samoe"], default=["dense", "moe", "samoe"])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32"])
    parser.add_argument("--swiglu", action="store_true", help="gated MLPs without biases, as Mixtral's")
    parser.add_argument("--samoe-combine", choices=["step", "layer"], default="step", help="as the pretrain program's")
    for name, size in (("num-layers", 8), ("seq-length", 256), ("micro-batch-size", 8), ("num-micro-batches", 1),
                       ("vocab-size", 8192), ("hidden-size", 384), ("ffn-hidden-size", 1536), ("num-experts", 16),
                       ("topk", 1)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--moe-ffn-hidden-size", type=int, help="width of an expert; the dense MLP's if not given")
    add_peer_options(parser)
    add_options(parser)
