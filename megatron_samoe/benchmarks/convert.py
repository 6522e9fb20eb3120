"""Time and memory of conversions against what safetensors takes to read and write the same bytes, in turn, in one run.

`megatron-samoe benchmark convert --dir DIR [--size-mb 2000] [--rounds 3] [--json FILE]`. Before every reading the files leave the page
cache, and after every writing they are flushed to disk, on both sides. Peak memory is the process's largest resident
size while it converts, Python and torch included. Files stay in DIR for the next run unless --clean is given.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_samoe.benchmarks.common import forget
from megatron_samoe.cli import convert
from megatron_samoe.config import DataConfig, ModelConfig, MoEConfig, PretrainConfig, TrainingConfig
from megatron_samoe.config.cli import to_mapping
from megatron_samoe.dist_checkpointing.global_tensors import StoredTensor, write_checkpoint
from megatron_samoe.errors import MegatronSamoeError
from megatron_samoe.evaluation.run_summary import format_table
from megatron_samoe.interop.hf.native import NativeModel

VOCABULARY = 257
EXPERTS, HIDDEN, FFN = 8, 1024, 4096
LAYER_BYTES = EXPERTS * 3 * FFN * HIDDEN * 2
ALLOWED_BEYOND_TENSORS = 500_000_000


class RandomModel:
    """A mixture in bf16 whose tensors are made when they are read."""

    def __init__(self, num_bytes: int):
        model = ModelConfig(
            num_layers=max(1, round(num_bytes / LAYER_BYTES)), hidden_size=HIDDEN, ffn_hidden_size=FFN, swiglu=True,
            num_attention_heads=16, normalization="RMSNorm", position_embedding_type="rope", disable_bias_linear=True,
        )  # fmt: skip
        moe = MoEConfig(expert_layout="moe", num_experts=EXPERTS, moe_router_topk=2, moe_ffn_hidden_size=model.mlp_size)
        config = PretrainConfig(
            model=model, moe=moe, training=TrainingConfig(bf16=True), data=DataConfig(mock_data=True)
        )
        self.config: Mapping[str, Any] = to_mapping(config)
        self.train_state: Mapping[str, Any] = {"iteration": 1, "vocab_size": VOCABULARY}
        self.tensors: Mapping[str, StoredTensor] = NativeModel(config, VOCABULARY).tensors

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor."""
        stored = self.tensors[name]
        return torch.empty(stored.shape, dtype=stored.dtype).normal_()

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(t.num_bytes for t in self.tensors.values())

    @property
    def largest_bytes(self) -> int:
        """Size of the largest tensor."""
        return max(t.num_bytes for t in self.tensors.values())


def resident_peak() -> int:
    """Returns the largest resident size since it was last forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def timed(run: Callable[[], None], reads: Path) -> tuple[float, int]:
    """Returns the seconds and the peak memory of a run that reads a folder which is not in the page cache."""
    forget(reads)
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    run()
    return time.perf_counter() - start, resident_peak()


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


def prepare(root: Path, model: RandomModel) -> None:
    """Writes the checkpoint and the folder that conversions start from, unless they are there."""
    if not (root / "native").exists():
        write_checkpoint(root / "native", 1, model)
    if not (root / "hf").exists():
        by_tool("--load-dir", root / "native", "--save-dir", root / "hf", "--to", "hf", "--max-shard-size", "100GB")


def measure(root: Path, rounds: int) -> dict[str, list[tuple[float, int]]]:
    """Returns seconds and peak bytes of each way, round by round."""
    out = root / "out"
    native, hf = root / "native", root / "hf"
    common = ("--save-dir", out)
    ways: dict[str, tuple[Path, Callable[[], None]]] = {
        "safetensors, read and write": (hf, lambda: by_safetensors(hf / "model.safetensors", out)),
        "native to Hugging Face": (native, lambda: by_tool("--load-dir", native, "--to", "hf", *common)),
        "Hugging Face to native": (hf, lambda: by_tool("--load-dir", hf, *common)),
        "native to Megatron, tensor 2": (
            native, lambda: by_tool("--load-dir", native, "--target-tensor-parallel-size", 2, *common)),
    }  # fmt: skip
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (reads, run) in ways.items():
            found[name].append(timed(run, reads))
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    return found


def main() -> int:
    """Runs the benchmark and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--size-mb", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--prepare-only", action="store_true")
    parser.add_argument("--clean", action="store_true", help="remove DIR at the end")
    options = parser.parse_args()
    model = RandomModel(options.size_mb * 1_000_000)
    prepare(options.dir, model)
    if options.prepare_only:
        return 0
    found = measure(options.dir, options.rounds)
    limit = 2 * model.largest_bytes + ALLOWED_BEYOND_TENSORS
    base = statistics.median(s for s, _ in next(iter(found.values())))
    rows = [["way", "median s", "MB/s", "ratio (of rounds)", "peak MB"]]
    for name, results in found.items():
        ratios = [s / b for (s, _), (b, _) in zip(results, next(iter(found.values())), strict=True)]
        seconds, peak = statistics.median(s for s, _ in results), max(p for _, p in results)
        rows.append([name, f"{seconds:.2f}", f"{model.num_bytes / seconds / 1e6:,.0f}",
                     f"{seconds / base:.2f} ({min(ratios):.2f} to {max(ratios):.2f})", f"{peak / 1e6:,.0f}"])  # fmt: skip
    print(f"{model.num_bytes / 1e9:.2f} GB of weights, largest tensor {model.largest_bytes / 1e6:.0f} MB, "
          f"{options.rounds} rounds; allowed peak {limit / 1e6:,.0f} MB")  # fmt: skip
    print(format_table(rows))
    if options.json:
        options.json.write_text(json.dumps({"num_bytes": model.num_bytes, "limit": limit, "results": found}, indent=1))
    if options.clean:
        shutil.rmtree(options.dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
