"""One model in several programs that serve: whether their greedy texts are ours, tokens/s, and the memory that it takes.

`megatron-samoe benchmark servers --vllm-python PYTHON --llama-python PYTHON` makes models of random weights, or takes
checkpoints with --load, and exports each: our class for transformers, with what layers share kept, and a GGUF file. Our
engine, transformers, vLLM's Transformers back end, vLLM with the plug-in and llama.cpp are processes that are loaded
together and asked in turn, round after round. They cannot share one environment, so the interpreters of vLLM and of
llama.cpp are options; a program without one is left out.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_samoe.benchmarks.common import Row, Rows, add_command, add_sizes, process_status_kb
from megatron_samoe.benchmarks.decode import (
    Pair,
    Worker,
    checkpoint_directory,
    checkpoint_model,
    make_checkpoint,
    started,
)
from megatron_samoe.cli.arguments import Options
from megatron_samoe.config.cli import from_mapping
from megatron_samoe.convert.gguf import export as gguf
from megatron_samoe.convert.hf.export import plan_export, write_export
from megatron_samoe.dist_checkpointing.global_tensors import CheckpointReader
from megatron_samoe.errors import ConfigError


def make_exports(checkpoint: Path, options: Options) -> tuple[Path, Path | None]:
    """Returns the folder for transformers and vLLM and llama.cpp's file, made unless there; None where it has no such model."""
    folder = options.work_dir / "servers" / checkpoint.resolve().as_posix().strip("/").replace("/", "-")
    source = CheckpointReader(checkpoint_directory(checkpoint))
    if not (folder / "hf").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_export(plan_export(source, "samoe"), folder / "hf")
    if not options.llama_python:
        return folder / "hf", None
    if not (folder / "gguf").exists():
        try:
            gguf.write_export(
                gguf.plan_export(source, from_mapping(source.config, str(checkpoint)).data), folder / "gguf"
            )
        except ConfigError as error:
            print(f"left out: llama.cpp: {error}", file=sys.stderr)
            return folder / "hf", None
    return folder / "hf", folder / "gguf" / gguf.FILE


def contestants(checkpoint: Path, options: Options) -> Iterator[tuple[str, str, Row]]:
    """Yields (name, interpreter, specification) of the programs."""
    longest = max(options.prompt_lengths)
    batch = max(options.batch_sizes)
    common: Row = {
        "threads": options.threads, "dtype": "fp32", "max_batch": batch, "warm_up": [(batch, longest)],
        "context": longest + options.new_tokens + 16, "step_tokens": max(512, batch * longest),
    }  # fmt: skip
    folder, file = make_exports(checkpoint, options)
    yield (
        "megatron_samoe",
        sys.executable,
        {**common, "program": "ours", "checkpoint": str(checkpoint), "serving": "auto"},
    )
    yield "transformers", sys.executable, {**common, "program": "transformers", "folder": str(folder)}
    if options.vllm_python:
        of_vllm = {**common, "program": "vllm", "folder": str(folder), "compiled": options.vllm_compile}
        yield "vLLM, its back end", options.vllm_python, {**of_vllm, "implementation": "transformers"}
        yield "vLLM, plug-in", options.vllm_python, {**of_vllm, "implementation": "plug-in"}
    if file is not None:
        vocab = checkpoint_model(checkpoint)[1]
        yield "llama.cpp", options.llama_python, {**common, "program": "xllamacpp", "file": str(file), "vocab": vocab}


def measure(checkpoint: Path, options: Options) -> Rows:
    """Returns a row for each program over a checkpoint."""
    pairs: list[Pair] = list(itertools.product(options.batch_sizes, options.prompt_lengths))
    texts: dict[tuple[str, Pair], list[int]] = {}
    times: dict[tuple[str, int], list[float]] = {}
    with started(list(contestants(checkpoint, options))) as workers:
        for _, (batch, length), worker in itertools.product(range(options.rounds), pairs, workers):
            result = worker.measure(batch, length, options.new_tokens)
            texts.setdefault((worker.name, (batch, length)), result["tokens"])
            times.setdefault((worker.name, batch), []).append(result["rest_s"] / (options.new_tokens - 1))
        return [_row(checkpoint, worker, workers[0].name, pairs, texts, times, options) for worker in workers]


def _row(
    checkpoint: Path, worker: Worker, ours: str, pairs: list[Pair], texts: dict[tuple[str, Pair], list[int]],
    times: dict[tuple[str, int], list[float]], options: Options,
) -> Row:  # fmt: skip
    same = sum(texts[worker.name, pair] == texts[ours, pair] for pair in pairs)
    speeds = {
        f"tokens/s, batch {batch}": round(batch / statistics.median(times[worker.name, batch]), 1)
        for batch in options.batch_sizes
    }
    resident_mb = process_status_kb("VmRSS", worker.process.pid) / 1e3
    return {
        "model": checkpoint.parent.name if checkpoint.name == "checkpoint" else str(checkpoint), "server": worker.name,
        "version": worker.facts["version"], "same texts": f"{same} of {len(pairs)}", **speeds,
        "MB for the model": round(resident_mb - worker.facts["before_mb"]), "MB in all": round(resident_mb),
    }  # fmt: skip


def run(options: Options) -> Rows:
    """The servers' texts, speeds and memory for each model."""
    if options.new_tokens < 2:
        raise ConfigError("--new-tokens", options.new_tokens, "must be 2 or more")
    options.threads = options.threads or torch.get_num_threads()
    made = options.load or [make_checkpoint(options, flags) for flags in options.models]
    return [row for checkpoint in made for row in measure(checkpoint, options)]


def add_parser(commands: Any) -> None:
    """Adds the subcommand `servers`, whose `run` gives rows for a table."""
    add = add_command(
        commands, "servers", "greedy texts, tokens/s and memory of one model in several programs that serve", run
    )
    add("--load", [Path], "checkpoints; else models of random weights")
    add("--models", ["--expert-sharing tied"], "flags of pretraining that say what the experts of each model are")
    add("--vllm-python", str, "interpreter with vLLM; without it vLLM is left out")
    add("--llama-python", str, "interpreter with xllamacpp; without it llama.cpp is left out")
    add("--vllm-compile", bool, "let vLLM compile the model, which takes minutes")
    add("--batch-sizes", [1, 8])
    add("--prompt-lengths", [4, 32, 100], "prompts are of random tokens")
    add("--new-tokens", 32)
    add("--rounds", 3)
    add("--threads", int, "default: all cores")
    add("--work-dir", Path("runs/benchmark_servers"), "for models and exports")
    add("--json", Path)
    add("--png", Path)
    add_sizes(add, "of a model of random weights", num_layers=8, hidden_size=256, ffn_hidden_size=1024, num_experts=16,
              topk=2, vocab_size=4096, context=256)  # fmt: skip
