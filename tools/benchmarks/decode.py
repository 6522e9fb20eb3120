"""Decoding: ms per token and tokens/s, the bytes that a step must read, and the memory's speed in the same run."""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import tyro

from megatron_samoe import children
from megatron_samoe.errors import ConfigError
from megatron_samoe.inference.decode_bytes import expected_distinct_experts, step_bytes
from megatron_samoe.inference.engine import Precision, Serving
from tools.benchmarks.contestants import (
    ROOT,
    Contestant,
    Pair,
    ServingBenchmark,
    Worker,
    checkpoint_model,
    export_gguf,
    export_hf,
    label,
    started,
    workers_of,
)
from tools.benchmarks.harness import DTYPES, Row, Rows
from tools.benchmarks.memory import Memory

#: Columns of the table; the JSON file has all.
SHOWN = (
    "dtype contestant serving batch prompt ms_per_token tokens_per_s prefill_ms experts_hit experts_expected read_mb floor_ms "
    "share_of_floor same_tokens"
).split()


@dataclass(frozen=True, kw_only=True)
class Decode(ServingBenchmark):
    """ms per token against the memory's floor and other programs

    Makes a model of random weights (1.2 G parameters by default), or takes checkpoints with --load, and runs every
    precision and way of serving over batches and prompt lengths. With --peers it exports the model and runs transformers'
    `generate` and llama.cpp over it in turn with ours.
    """

    name = "decode"
    not_told: ClassVar[tuple[str, ...]] = ("load", "llama_python", "checkouts")

    dtypes: tuple[Precision, ...] = ("fp32",)
    servings: tuple[Serving, ...] = ("auto",)
    rounds: int = 5
    """counted rounds; medians are reported"""
    checkouts: tuple[Path, ...] = ()
    """other versions of this project, each a folder in which it is built, that decode in turn with this one"""
    peers: tuple[Literal["transformers", "llama.cpp"], ...] = ()
    llama_python: str | None = None
    """interpreter with llama-cpp-python"""
    transformers_experts: tuple[str, ...] = ("default",)
    """their experts_implementation"""
    prepare: bool = False
    """make models and exports, and measure nothing"""
    weights_folder: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """keep weights in files there, which Linux may drop from memory"""
    memory_limit: Annotated[float, tyro.conf.arg(metavar="GB")] = 0.0
    """GB that each contestant of ours may hold of what it reads while it decodes, by a control group; 0 for no limit"""

    def rows(self) -> Rows:
        if "llama.cpp" in self.peers and not self.llama_python:
            raise ConfigError("--peers", "llama.cpp", "needs --llama-python, an interpreter with llama-cpp-python")
        for folder in self.checkouts:
            if not workers_of(folder).is_file():
                raise ConfigError("--checkouts", str(folder), "must be a folder with this project's files, built there")
        if self.memory_limit and not self.weights_folder:
            raise ConfigError(
                "--memory-limit", self.memory_limit, "needs --weights-folder: other weights cannot leave memory"
            )
        checkpoints = self.checkpoints()
        contestants = {dtype: list(self.contestants(dtype, checkpoints)) for dtype in self.dtypes}
        if self.prepare:
            print(f"prepared {', '.join(map(str, checkpoints))}")
            raise SystemExit(0)
        return [row for dtype in self.dtypes for row in self._rows(contestants[dtype], checkpoints[0])]

    def save(self, rows: Rows, found: Row) -> None:
        self.write_json(rows)
        print(f"memory read at {rows[0]['bandwidth_gb_s']:.1f} GB/s")
        rows[:] = [{name: row.get(name) for name in SHOWN} for row in rows]

    def contestants(self, dtype: Precision, checkpoints: Sequence[Path]) -> Iterator[Contestant]:
        """Yields the contestants of one precision; exports are made unless they are there."""
        common = self.common_spec(dtype)
        for checkpoint, serving in itertools.product(checkpoints, self.servings):
            spec = {**common, "program": "ours", "checkpoint": str(checkpoint), "serving": serving}
            limits = {"weights_folder": self.weights_folder, "memory_limit": int(1e9 * self.memory_limit)}
            yield Contestant(f"{label(checkpoint)} {serving}", sys.executable, {**spec, **limits})
            for folder in self.checkouts:
                yield Contestant(f"{folder} {serving}", sys.executable, {**spec, **limits}, folder)
        exports = self.export_folder(checkpoints[0])
        if "transformers" in self.peers and dtype != "int8":
            spec = {**common, "program": "transformers", "folder": str(export_hf(checkpoints[0], exports))}
            for way in self.transformers_experts:
                yield Contestant(f"transformers {way}", sys.executable, {**spec, "implementation": way})
        if "llama.cpp" in self.peers:
            assert self.llama_python is not None
            file = export_gguf(checkpoints[0], exports, DTYPES.get(dtype, torch.float32))
            if dtype == "int8" and not (exports / "int8.gguf").exists():
                words = ["quantize", str(file), str(exports / "int8.gguf")]
                children.run([self.llama_python, str(workers_of(ROOT)), *words], check=True)
            spec = {**common, "program": "llama.cpp", "file": str(exports / "int8.gguf" if dtype == "int8" else file)}
            yield Contestant("llama.cpp", self.llama_python, spec)

    def _rows(self, contestants: Sequence[Contestant], first_checkpoint: Path) -> Rows:
        """Runs the contestants of one precision in turn and returns a row for each of their batches and lengths."""
        results: dict[tuple[str, Pair], Rows] = {}
        memory = Memory(contestants[0].spec["threads"])
        with started(contestants) as workers:
            ours = [worker for worker in workers if worker.is_ours]
            counted = {(w.name, pair): w.measure(*pair, self.new_tokens, 1) for w in ours for pair in self.pairs}
            before = memory.read()
            for pair, worker, result in self.measure(workers):
                after = memory.read()
                results.setdefault((worker.name, pair), []).append({**result, "bandwidth": (before + after) / 2})
                before = after
        rows = []
        for pair, worker in itertools.product(self.pairs, workers):
            of_first = results[ours[0].name, pair]
            hits = counted.get((worker.name, pair), counted[ours[0].name, pair])
            row = self._row(worker, pair, results[worker.name, pair], hits, first_checkpoint)
            rows.append({**row, "same_tokens": _same(of_first[0]["tokens"], results[worker.name, pair][0]["tokens"])})
        return rows

    def _row(self, worker: Worker, pair: Pair, results: Rows, counted: Row, first_checkpoint: Path) -> Row:
        batch, length = pair
        samples_s = self.step_seconds(results)
        step_s = statistics.median(samples_s)
        bandwidths = [result["bandwidth"] for result in results]
        bandwidth = statistics.median(bandwidths)
        config, vocab = checkpoint_model(Path(worker.spec.get("checkpoint") or first_checkpoint))
        dtype, serving, hit = worker.spec["dtype"], worker.facts.get("serving", "folded"), counted.get("distinct")
        model = (config, vocab, batch, length + self.new_tokens / 2, serving, dtype)
        num_bytes = step_bytes(*model, hit).total
        chosen = [
            expected_distinct_experts(count, config.moe.moe_router_topk, batch) for count in config.moe.expert_counts
        ]
        return {
            "dtype": dtype,
            "contestant": worker.name,
            "serving": worker.facts.get("serving", ""),
            "threads": worker.spec["threads"],
            "version": worker.facts["version"],
            "batch": batch,
            "prompt": length,
            "ms_per_token": step_s * 1e3,
            "tokens_per_s": batch / step_s,
            "prefill_ms": statistics.median(result["first_s"] for result in results) * 1e3,
            "weights_mb": worker.facts.get("weights_mb"),
            "experts_hit": hit,
            "experts_expected": None if hit is None else statistics.mean(chosen),
            "read_mb": num_bytes / 1e6,
            "read_mb_expected": step_bytes(*model).total / 1e6,
            "bandwidth_gb_s": bandwidth / 1e9,
            "floor_ms": num_bytes / bandwidth * 1e3,
            # Round by round, by what was read before and after: memory that others use too changes its speed within a run.
            "share_of_floor": statistics.median(
                num_bytes / speed / seconds for speed, seconds in zip(bandwidths, samples_s, strict=True)
            ),
            **{name: counted[name] for name in ("hits", "misses") if name in counted},
            "samples_ms": [round(sample * 1e3, 3) for sample in samples_s],
            "bandwidths_gb_s": [round(speed / 1e9, 2) for speed in bandwidths],
        }


def _same(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
