"""Time and memory of conversions against what safetensors takes to read and write the same bytes."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_samoe.cli import convert
from megatron_samoe.config import DataConfig, ModelConfig, MoEConfig, PretrainConfig, TrainingConfig
from megatron_samoe.config.cli import to_mapping
from megatron_samoe.convert.native import NativeModel
from megatron_samoe.dist_checkpointing.global_tensors import write_checkpoint
from megatron_samoe.errors import MegatronSamoeError
from megatron_samoe.evaluation.run_summary import format_table
from tools.benchmarks.harness import Benchmark, Run, forget, forget_peak, process_status_kb, seconds_of
from tools.benchmarks.models import MadeModel

VOCABULARY = 257
EXPERTS, HIDDEN, FFN = 8, 1024, 4096
LAYER_BYTES = EXPERTS * 3 * FFN * HIDDEN * 2
ALLOWED_BEYOND_TENSORS = 500_000_000


@dataclass(frozen=True, kw_only=True)
class ConvertBenchmark(Benchmark):
    """conversions beside safetensors' reading and writing

    Before every reading the files leave the page cache, and after every writing they are flushed to disk, on both sides.
    Peak memory is the process's largest resident size while it converts, Python and torch included. Files stay in DIR for
    the next run unless --clean is given.
    """

    name = "convert"

    dir: Path
    size_mb: int = 2000
    rounds: int = 3
    """counted rounds; medians are reported"""
    prepare_only: bool = False
    clean: bool = False
    """remove DIR at the end"""

    def run(self) -> None:
        model = random_model(self.size_mb * 1_000_000)
        prepare(self.dir, model)
        if self.prepare_only:
            return
        found = self._measure()
        sizes = [stored.num_bytes for stored in model.tensors.values()]
        num_bytes, limit = sum(sizes), 2 * max(sizes) + ALLOWED_BEYOND_TENSORS
        base = [seconds for seconds, _ in next(iter(found.values()))]
        rows = [["way", "median s", "MB/s", "ratio (of rounds)", "peak MB"]]
        for name, results in found.items():
            times, peaks = zip(*results, strict=True)
            ratios = [s / b for s, b in zip(times, base, strict=True)]
            seconds = statistics.median(times)
            ratio = f"{seconds / statistics.median(base):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            rows.append(
                [name, f"{seconds:.2f}", f"{num_bytes / seconds / 1e6:,.0f}", ratio, f"{max(peaks) / 1e6:,.0f}"]
            )
        print(
            f"{num_bytes / 1e9:.2f} GB of weights, largest tensor {max(sizes) / 1e6:.0f} MB, {self.rounds} rounds; "
            f"allowed peak {limit / 1e6:,.0f} MB\n{format_table(rows)}"
        )
        self.write_json({"num_bytes": num_bytes, "limit": limit, "results": found})
        if self.clean:
            shutil.rmtree(self.dir)

    def _measure(self) -> dict[str, list[tuple[float, int]]]:
        """Returns seconds and peak bytes of each way, round by round."""
        out, native, hf = self.dir / "out", self.dir / "native", self.dir / "hf"
        ways: dict[str, tuple[Path, Run]] = {
            "safetensors, read and write": (hf, lambda: by_safetensors(hf / "model.safetensors", out)),
            "native to Hugging Face": (native, lambda: by_tool(native, out, "--to", "hf")),
            "Hugging Face to native": (hf, lambda: by_tool(hf, out)),
            "native to torch_dist": (native, lambda: by_tool(native, out, "--to", "torch_dist")),
        }
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
        for _ in range(self.rounds):
            for name, (reads, run) in ways.items():
                found[name].append(timed(run, reads))
                shutil.rmtree(out) if out.is_dir() else out.unlink()
        return found


def random_model(num_bytes: int) -> MadeModel:
    """Returns a mixture in bf16 of about so many bytes."""
    model = ModelConfig(
        num_layers=max(1, round(num_bytes / LAYER_BYTES)),
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        swiglu=True,
        num_attention_heads=16,
        normalization="RMSNorm",
        position_embedding_type="rope",
        disable_bias_linear=True,
    )
    moe = MoEConfig(expert_layout="moe", num_experts=EXPERTS, moe_router_topk=2, moe_ffn_hidden_size=model.mlp_size)
    config = PretrainConfig(model=model, moe=moe, training=TrainingConfig(bf16=True), data=DataConfig(mock_data=True))
    tensors = NativeModel(config, VOCABULARY).tensors

    def make(name: str) -> torch.Tensor:
        return torch.empty(tensors[name].shape, dtype=tensors[name].dtype).normal_()

    return MadeModel(tensors, to_mapping(config), {"iteration": 1, "vocab_size": VOCABULARY}, make)


def prepare(root: Path, model: MadeModel) -> None:
    """Writes the checkpoint and the folder that conversions start from, unless they are there."""
    if not (root / "native").exists():
        write_checkpoint(root / "native", 1, model)
    if not (root / "hf").exists():
        by_tool(root / "native", root / "hf", "--to", "hf", "--max-shard-size", "100GB")


def timed(run: Run, reads: Path) -> tuple[float, int]:
    """Returns the seconds and the peak memory in bytes of a run that reads a folder which is not in the page cache."""
    forget(reads)
    forget_peak()
    return seconds_of(run), 1024 * process_status_kb("VmHWM")


def by_safetensors(source: Path, target: Path) -> None:
    """Reads and writes a file with the library alone, and flushes it."""
    save_file(load_file(source), target, {"format": "pt"})
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def by_tool(source: Path, target: Path, *flags: str) -> None:
    """Converts, quietly."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        if convert.main(["--load-dir", str(source), "--save-dir", str(target), *flags]):
            raise MegatronSamoeError(out.getvalue())
