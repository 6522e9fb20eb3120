"""One model in several programs that serve: whether their greedy texts are ours, tokens/s, and the memory that it takes."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_samoe.errors import ConfigError
from tools.benchmarks.contestants import (
    Contestant,
    Pair,
    ServingBenchmark,
    Worker,
    checkpoint_model,
    export_gguf,
    export_hf,
    label,
    started,
)
from tools.benchmarks.harness import Row, Rows, process_status_kb


@dataclass(frozen=True, kw_only=True)
class Servers(ServingBenchmark):
    """greedy texts, tokens/s and memory of one model in several programs that serve

    Each model is exported: our class for transformers, with what layers share kept, and a GGUF file. Our engine,
    transformers, vLLM's Transformers back end, vLLM with the plug-in and llama.cpp cannot share one environment, so the
    interpreters of vLLM and of llama.cpp are options; a program without one is left out.
    """

    name = "servers"
    not_told: ClassVar[tuple[str, ...]] = ("load", "vllm_python", "llama_python")

    models: tuple[str, ...] = ("--expert-sharing tied",)
    """flags of pretraining that say what the experts of each model are"""
    vllm_python: str | None = None
    """interpreter with vLLM; without it vLLM is left out"""
    llama_python: str | None = None
    """interpreter with xllamacpp; without it llama.cpp is left out"""
    vllm_compile: bool = False
    """let vLLM compile the model, which takes minutes"""
    prompt_lengths: tuple[int, ...] = (4, 32, 100)
    """prompts are of random tokens"""
    new_tokens: int = 32
    rounds: int = 3
    """counted rounds; medians are reported"""
    work_dir: Path = Path("runs/benchmark_servers")
    """for models and exports"""
    num_layers: int = 8
    """of a model of random weights, as the sizes below"""
    hidden_size: int = 256
    ffn_hidden_size: int = 1024
    num_experts: int = 16
    vocab_size: int = 4096
    context: int = 256

    def rows(self) -> Rows:
        return [row for checkpoint in self.checkpoints() for row in self._rows(checkpoint)]

    def _contestants(self, checkpoint: Path) -> Iterator[Contestant]:
        common, exports = self.common_spec("fp32"), self.export_folder(checkpoint)
        folder = str(export_hf(checkpoint, exports, shared=True))
        ours = {**common, "program": "ours", "checkpoint": str(checkpoint), "serving": "auto"}
        yield Contestant("megatron_samoe", sys.executable, ours)
        yield Contestant("transformers", sys.executable, {**common, "program": "transformers", "folder": folder})
        if self.vllm_python:
            of_vllm = {**common, "program": "vllm", "folder": folder, "compiled": self.vllm_compile}
            for name, way in (("vLLM, its back end", "transformers"), ("vLLM, plug-in", "plug-in")):
                yield Contestant(name, self.vllm_python, {**of_vllm, "implementation": way})
        if self.llama_python:
            try:
                file = {"file": str(export_gguf(checkpoint, exports)), "vocab": checkpoint_model(checkpoint)[1]}
                yield Contestant("llama.cpp", self.llama_python, {**common, "program": "xllamacpp", **file})
            except ConfigError as error:
                print(f"left out: llama.cpp: {error}", file=sys.stderr)

    def _rows(self, checkpoint: Path) -> Rows:
        """Returns a row for each program over a checkpoint."""
        texts: dict[tuple[str, Pair], list[int]] = {}
        results: dict[tuple[str, int], Rows] = {}
        with started(list(self._contestants(checkpoint))) as workers:
            for pair, worker, result in self.measure(workers):
                texts.setdefault((worker.name, pair), result["tokens"])
                results.setdefault((worker.name, pair[0]), []).append(result)

            def row(worker: Worker) -> Row:
                same = sum(texts[worker.name, pair] == texts[workers[0].name, pair] for pair in self.pairs)
                seconds = {b: statistics.median(self.step_seconds(results[worker.name, b])) for b in self.batch_sizes}
                resident_mb = process_status_kb("VmRSS", worker.process.pid) / 1e3
                return {
                    "model": label(checkpoint),
                    "server": worker.name,
                    "version": worker.facts["version"],
                    "same texts": f"{same} of {len(self.pairs)}",
                    **{f"tokens/s, batch {batch}": round(batch / s, 1) for batch, s in seconds.items()},
                    "MB for the model": round(resident_mb - worker.facts["before_mb"]),
                    "MB in all": round(resident_mb),
                }

            return [row(worker) for worker in workers]
