"""`benchmark.py train-step`: whole optimizer steps of dense, MoE and SaMoE models with equal active parameters."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from megatron_samoe.benchmarks.common import (
    DTYPES,
    Rows,
    add_command,
    add_options,
    add_sizes,
    alternate,
    model_config,
    process_status_kb,
)
from megatron_samoe.benchmarks.layer import products
from megatron_samoe.benchmarks.peers import add_peer_options, running
from megatron_samoe.cli.arguments import Options
from megatron_samoe.config import PretrainConfig
from megatron_samoe.parallel_state import backend, single_process_state
from megatron_samoe.planning.accounting import count_parameters, train_flops_per_token
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import train_step


def make_config(options: Options, model: str, dtype: str) -> PretrainConfig:
    """Returns a model, "layout" or "layout, optimizer"; a SaMoE has a bank for four layers."""
    layout, _, optimizer = model.partition(", ")
    config = model_config(
        options, layout, options.num_micro_batches, moe_router_topk=options.topk,
        moe_ffn_hidden_size=options.moe_ffn_hidden_size or options.ffn_hidden_size,
        samoe_combine=options.samoe_combine if layout == "samoe" else None,
    )  # fmt: skip
    gated, width = options.swiglu, options.ffn_hidden_size
    return replace(
        config,
        model=replace(config.model, ffn_hidden_size=width, swiglu=gated, disable_bias_linear=gated),
        training=replace(config.training, bf16=dtype == "bf16"),
        optimizer=replace(config.optimizer, optimizer="muon" if optimizer == "muon" else "adam"),
    )


def make_step(options: Options, model: str, dtype: str) -> Callable[[], object]:
    """Returns a run of one optimizer step."""
    setup = build_setup(make_config(options, model, dtype), options.vocab_size, single_process_state())
    shape = (options.micro_batch_size, options.seq_length)
    batch = {
        "tokens": torch.randint(options.vocab_size, shape),
        "labels": torch.randint(options.vocab_size, shape),
        "loss_mask": torch.ones(shape),
    }
    state = initial_state(setup)
    return lambda: train_step(setup, state, [batch] * options.num_micro_batches)


def _peak(options: Options, model: str, dtype: str, answers: Any) -> None:
    backend.keep_freed_memory()
    torch.set_num_threads(torch.get_num_threads() if options.threads is None else options.threads)
    step = make_step(options, model, dtype)
    for _ in range(2):
        step()
    # Not ru_maxrss: it begins with what the parent held.
    answers.put(process_status_kb("VmHWM") / 1024)


def peak_megabytes(options: Options, model: str, dtype: str) -> float:
    """Returns the most memory that a process of its own holds over two steps."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_peak, args=(options, model, dtype, answers))
    process.start()
    peak: float = answers.get()
    process.join()
    return peak


def run(options: Options) -> Rows:
    """Steps of all layouts and optimizers in turn, and of peers where a folder is given; memory each in a process of its own."""
    rows = []
    models = [layout if o == "adam" else f"{layout}, {o}" for layout in options.layouts for o in options.optimizers]
    for dtype in options.dtype:
        flops, counts = {}, {}
        variants: dict[str, Callable[[], object]] = {}
        for model in models:
            config = make_config(options, model, dtype)
            variants[model] = make_step(options, model, dtype)
            flops[model] = train_flops_per_token(config, options.vocab_size)
            counts[model] = count_parameters(config, options.vocab_size)
        tokens = options.micro_batch_size * options.num_micro_batches * options.seq_length
        micro_rows, ffn = options.micro_batch_size * options.seq_length, options.ffn_hidden_size
        variants["dense products"] = products([micro_rows], options.hidden_size, ffn, ffn, DTYPES[dtype])
        product_flops = 6 * 2 * micro_rows * options.hidden_size * ffn
        names = [f"moe:grouped_mm:k={options.topk}:fused" + (":bf16" if dtype == "bf16" else "")]
        sizes = {"L": options.num_layers, "H": options.hidden_size, "F": ffn, "heads": options.hidden_size // 64,
                 "E": options.num_experts, "V": options.vocab_size, "S": options.seq_length,
                 "B": options.micro_batch_size}  # fmt: skip
        with running(options, "w2_train_step.py", names, sizes) as peers:
            variants.update({peer.name: peer.seconds for peer in peers})
            medians = alternate(variants, options.rounds, options.clock)
            # Not what they say: their ru_maxrss begins with what this process held.
            peer_memory = {peer.name: round(process_status_kb("VmHWM", peer.process.pid) / 1024) for peer in peers}
        ceiling = product_flops / medians.pop("dense products")
        first = medians[models[0]]
        for name, seconds in medians.items():
            count = counts.get(name)
            rows.append({
                "model": name, "dtype": dtype,
                "parameters": count.total if count else None, "active": count.active if count else None,
                "tokens:s": round(tokens / seconds, 1),
                "share_of_dense_products": round(tokens / seconds * flops[name] / ceiling, 3) if count else None,
                f"speed / {models[0]}": round(first / seconds, 3),
                "peak_mb": peer_memory.get(name) or (round(peak_megabytes(options, name, dtype)) if count else None),
            })  # fmt: skip
    return rows


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    add = add_command(commands, "train-step", "optimizer steps of whole models", run)
    layouts = ("dense", "moe", "samoe")
    add("--layouts", [layouts], default=list(layouts))
    add("--optimizers", [("adam", "muon")], "each layout is trained by each", default=["adam"])
    add("--dtype", [tuple(DTYPES)], default=["fp32"])
    add("--swiglu", bool, "gated MLPs without biases, as Mixtral's")
    add("--samoe-combine", ("step", "layer"), "as the pretrain program's")
    add_sizes(add, num_layers=8, seq_length=256, micro_batch_size=8, num_micro_batches=1, vocab_size=8192, hidden_size=384,
              ffn_hidden_size=1536, num_experts=16, topk=1)  # fmt: skip
    add("--moe-ffn-hidden-size", int, "width of an expert; the dense MLP's if not given")
    add_peer_options(add)
    add_options(add)
