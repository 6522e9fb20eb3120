"""Time and memory of conversions against what safetensors takes to read and write the same bytes, in turn, in one run.

`megatron-samoe benchmark convert --dir DIR [--size-mb 2000] [--rounds 3] [--json FILE]`. Before every reading the files leave the page
cache, and after every writing they are flushed to disk, on both sides. Peak memory is the process's largest resident
size while it converts, Python and torch included. Files stay in DIR for the next run unless --clean is given.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_samoe.benchmarks.common import (
    MadeModel,
    add_alone,
    forget,
    forget_peak,
    process_status_kb,
    seconds_of,
    write_json,
)
from megatron_samoe.cli import convert
from megatron_samoe.cli.arguments import Options
from megatron_samoe.config import DataConfig, ModelConfig, MoEConfig, PretrainConfig, TrainingConfig
from megatron_samoe.config.cli import to_mapping
from megatron_samoe.convert.native import NativeModel
from megatron_samoe.dist_checkpointing.global_tensors import write_checkpoint
from megatron_samoe.errors import MegatronSamoeError
from megatron_samoe.evaluation.run_summary import format_table

VOCABULARY = 257
EXPERTS, HIDDEN, FFN = 8, 1024, 4096
LAYER_BYTES = EXPERTS * 3 * FFN * HIDDEN * 2
ALLOWED_BEYOND_TENSORS = 500_000_000


def random_model(num_bytes: int) -> MadeModel:
    """Returns a mixture in bf16 of about so many bytes."""
    model = ModelConfig(
        num_layers=max(1, round(num_bytes / LAYER_BYTES)), hidden_size=HIDDEN, ffn_hidden_size=FFN, swiglu=True,
        num_attention_heads=16, normalization="RMSNorm", position_embedding_type="rope", disable_bias_linear=True,
    )  # fmt: skip
    moe = MoEConfig(expert_layout="moe", num_experts=EXPERTS, moe_router_topk=2, moe_ffn_hidden_size=model.mlp_size)
    config = PretrainConfig(model=model, moe=moe, training=TrainingConfig(bf16=True), data=DataConfig(mock_data=True))
    tensors = NativeModel(config, VOCABULARY).tensors

    def make(name: str) -> torch.Tensor:
        return torch.empty(tensors[name].shape, dtype=tensors[name].dtype).normal_()

    return MadeModel(tensors, to_mapping(config), {"iteration": 1, "vocab_size": VOCABULARY}, make)


def timed(run: Callable[[], None], reads: Path) -> tuple[float, int]:
    """Returns the seconds and the peak memory in bytes of a run that reads a folder which is not in the page cache."""
    forget(reads)
    forget_peak()
    return seconds_of(run), 1024 * process_status_kb("VmHWM")


def by_safetensors(source: Path, target: Path) -> None:
    """Reads and writes a file with the library alone, and flushes it."""
    save_file(load_file(source), target, {"format": "pt"})
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def by_tool(*arguments: object) -> None:
    """Converts, quietly."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        if convert.main([str(a) for a in arguments]):
            raise MegatronSamoeError(out.getvalue())


def prepare(root: Path, model: MadeModel) -> None:
    """Writes the checkpoint and the folder that conversions start from, unless they are there."""
    if not (root / "native").exists():
        write_checkpoint(root / "native", 1, model)
    if not (root / "hf").exists():
        by_tool("--load-dir", root / "native", "--save-dir", root / "hf", "--to", "hf", "--max-shard-size", "100GB")


def measure(root: Path, rounds: int) -> dict[str, list[tuple[float, int]]]:
    """Returns seconds and peak bytes of each way, round by round."""
    out, native, hf = root / "out", root / "native", root / "hf"
    ways: dict[str, tuple[Path, Callable[[], None]]] = {
        "safetensors, read and write": (hf, lambda: by_safetensors(hf / "model.safetensors", out)),
        "native to Hugging Face": (native, lambda: by_tool("--load-dir", native, "--to", "hf", "--save-dir", out)),
        "Hugging Face to native": (hf, lambda: by_tool("--load-dir", hf, "--save-dir", out)),
        "native to Megatron, tensor 2": (
            native, lambda: by_tool("--load-dir", native, "--target-tensor-parallel-size", 2, "--save-dir", out)),
    }  # fmt: skip
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (reads, run) in ways.items():
            found[name].append(timed(run, reads))
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    return found


def run(options: Options) -> None:
    """Converts, and prints a table."""
    model = random_model(options.size_mb * 1_000_000)
    prepare(options.dir, model)
    if options.prepare_only:
        return
    found = measure(options.dir, options.rounds)
    sizes = [stored.num_bytes for stored in model.tensors.values()]
    num_bytes, limit = sum(sizes), 2 * max(sizes) + ALLOWED_BEYOND_TENSORS
    base = [seconds for seconds, _ in next(iter(found.values()))]
    rows = [["way", "median s", "MB/s", "ratio (of rounds)", "peak MB"]]
    for name, results in found.items():
        times, peaks = zip(*results, strict=True)
        ratios = [s / b for s, b in zip(times, base, strict=True)]
        seconds = statistics.median(times)
        rows.append([name, f"{seconds:.2f}", f"{num_bytes / seconds / 1e6:,.0f}",
                     f"{seconds / statistics.median(base):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                     f"{max(peaks) / 1e6:,.0f}"])  # fmt: skip
    print(f"{num_bytes / 1e9:.2f} GB of weights, largest tensor {max(sizes) / 1e6:.0f} MB, "
          f"{options.rounds} rounds; allowed peak {limit / 1e6:,.0f} MB")  # fmt: skip
    print(format_table(rows))
    write_json(options.json, {"num_bytes": num_bytes, "limit": limit, "results": found})
    if options.clean:
        shutil.rmtree(options.dir)


def add_parser(commands: Any) -> None:
    """Adds the subcommand `convert`."""
    add = add_alone(
        commands, "convert", "conversions beside safetensors' reading and writing", run, description=__doc__
    )
    add("--dir", Path, required=True)
    add("--size-mb", 2000)
    add("--rounds", 3)
    add("--json", Path)
    add("--prepare-only", bool)
    add("--clean", bool, "remove DIR at the end")
