"""Measures decoding: ms per token and tokens/s, the bytes that a step must read, and the memory's speed in the same run.

`benchmark.py decode` makes a model of random weights (1.2 G parameters unless told otherwise), or takes checkpoints with
--load, and runs every precision and way of serving over batches and prompt lengths. With --peers it exports the model and
runs transformers' `generate` and llama.cpp over it in turn with ours. Contestants of one precision are processes that are
loaded together and asked one after another, round after round; medians are reported.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.config import DataConfig, ModelConfig, MoEConfig, PretrainConfig
from megatron_samoe.config.checkpoint import CheckpointConfig
from megatron_samoe.config.cli import from_mapping, to_mapping
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.global_tensors import CheckpointReader, StoredTensor, write_checkpoint
from megatron_samoe.errors import ConfigError, MegatronSamoeError
from megatron_samoe.evaluation.run_summary import format_table
from megatron_samoe.inference.decode_bytes import expected_distinct_experts, step_bytes
from megatron_samoe.inference.engine import PRECISIONS, SERVINGS
from megatron_samoe.inference.huge_pages import ask_for_huge_pages
from megatron_samoe.interop.hf.export import plan_export, write_export
from megatron_samoe.models.rank_model import build_model
from megatron_samoe.parallel_state import backend, single_process_state

WORKERS = Path(__file__).with_name("decode_workers.py")
PEERS = ("transformers", "llama.cpp")


@dataclass(frozen=True)
class RandomModel:
    """Weights in memory as a source of a checkpoint."""

    weights: Mapping[str, Tensor]
    config: Mapping[str, Any]
    train_state: Mapping[str, Any]

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        return {name: StoredTensor(tuple(t.shape), t.dtype) for name, t in self.weights.items()}

    def read(self, name: str) -> Tensor:
        return self.weights[name]


def make_checkpoint(options: argparse.Namespace) -> Path:
    """Returns the folder of a model of random weights, made unless it is there."""
    heads = max(options.hidden_size // 64, 1)
    config = PretrainConfig(
        model=ModelConfig(
            num_layers=options.num_layers, hidden_size=options.hidden_size, ffn_hidden_size=options.ffn_hidden_size,
            num_attention_heads=heads, seq_length=options.context, position_embedding_type="rope", swiglu=True,
            normalization="RMSNorm", disable_bias_linear=True, untie_embeddings_and_output_weights=True,
            init_method_std=0.05,  # spread enough that greedy text does not repeat one token
        ),
        moe=MoEConfig(options.expert_layout, num_experts=options.num_experts, moe_router_topk=options.topk,
                      moe_ffn_hidden_size=options.ffn_hidden_size,
                      **({"num_expert_banks": options.num_expert_banks} if options.expert_layout == "samoe" else {})),
        data=DataConfig(mock_data=True, tokenizer_type="ByteTokenizer"),
    )  # fmt: skip
    sizes = (options.num_layers, options.hidden_size, options.ffn_hidden_size, options.num_experts, options.topk)
    folder = options.work_dir / "-".join(map(str, (options.expert_layout, *sizes, options.vocab_size)))
    if not (folder / "checkpoint").exists():
        model = build_model(config, options.vocab_size, single_process_state())
        weights = {name: p.detach() for name, p in model.global_parameters().items()}
        state = {"iteration": 1, "consumed_samples": 0, "consumed_tokens": 0, "optimizer_steps": 0,
                 "vocab_size": options.vocab_size, "loss_scale": {"value": 1.0, "good_steps": 0, "growth_interval": 0}}  # fmt: skip
        write_checkpoint(folder / "checkpoint", 1, RandomModel(weights, to_mapping(config), state))
    return folder / "checkpoint"


@functools.cache
def _directory(checkpoint: Path) -> Path:
    wanted = CheckpointConfig(load=str(checkpoint), exit_on_missing_checkpoint=True)
    found = store.find_checkpoint(wanted, lambda d: store.damaged_files(d, single_process_state()))
    assert found is not None
    return found


def make_exports(checkpoint: Path, options: argparse.Namespace) -> Path:
    """Returns the folder with transformers' export of a checkpoint and llama.cpp's files, made unless there."""
    folder = options.work_dir / "exports" / checkpoint.resolve().as_posix().strip("/").replace("/", "-")
    if not (folder / "hf").exists():
        folder.mkdir(parents=True, exist_ok=True)
        source = CheckpointReader(_directory(checkpoint))
        has_pool = source.config["moe"]["expert_layout"] == "samoe"
        write_export(plan_export(source, fold=has_pool), folder / "hf")
    if "llama.cpp" in options.peers:
        for dtype in options.dtypes:
            path = folder / f"{dtype}.gguf"
            if not path.exists():
                command = [options.llama_python, str(WORKERS), "gguf", str(folder / "hf"), str(path), dtype]
                subprocess.run(command, check=True)
    return folder


class Worker:
    """A contestant in a process of its own."""

    def __init__(self, name: str, python: str, spec: dict[str, Any]):
        self.name, self.spec = name, spec
        environment = dict(os.environ, OMP_NUM_THREADS=str(spec["threads"]), TOKENIZERS_PARALLELISM="false")
        self._process = subprocess.Popen([python, str(WORKERS), json.dumps(spec)], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True, env=environment)  # fmt: skip
        self.info = self._answer()

    def ask(self, *numbers: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, numbers)) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@@"):
                return json.loads(line[2:])
        raise MegatronSamoeError(f"{self.name} ended with status {self._process.wait()}; its message is above.")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def specs(
    dtype: str, checkpoints: list[Path], options: argparse.Namespace
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields (name, interpreter, specification) of the contestants of one precision."""
    pairs = list(itertools.product(options.batch_sizes, options.prompt_lengths))
    common = {
        "threads": options.threads, "dtype": dtype, "max_batch": max(options.batch_sizes), "warm_up": pairs[-1:],
        "context": max(options.prompt_lengths) + options.new_tokens + 16,
        "step_tokens": max(512, *(batch * length for batch, length in pairs)),
    }  # fmt: skip
    for checkpoint, serving in itertools.product(checkpoints, options.servings):
        label = checkpoint.parent.name if checkpoint.name == "checkpoint" else str(checkpoint)
        yield f"{label} {serving}", sys.executable, {**common, "program": "ours", "checkpoint": str(checkpoint),
                                                     "serving": serving}  # fmt: skip
    for peer, checkpoint in itertools.product(options.peers, checkpoints[:1]):
        exports = make_exports(checkpoint, options)
        if peer == "transformers" and dtype != "int8":
            for implementation in options.transformers_experts:
                yield f"transformers {implementation}", sys.executable, {
                    **common, "program": peer, "folder": str(exports / "hf"), "implementation": implementation}  # fmt: skip
        if peer == "llama.cpp":
            yield peer, options.llama_python, {**common, "program": peer, "file": str(exports / f"{dtype}.gguf")}


@contextmanager
def started(contestants: list[tuple[str, str, dict[str, Any]]]) -> Iterator[list[Worker]]:
    """Starts the contestants and ends them; ways of serving that a checkpoint lacks are left out, and that is said.

    Raises:
        ConfigError: no checkpoint can be served as asked.
    """
    workers: list[Worker] = []
    try:
        for one in contestants:
            worker = Worker(*one)
            workers.append(worker)
            if "refused" in worker.info:
                print(f"left out: {worker.name}: {worker.info['refused']}", file=sys.stderr)
        served = [worker for worker in workers if "refused" not in worker.info]
        if not any(worker.spec["program"] == "ours" for worker in served):
            raise ConfigError(
                "--servings", [one[2].get("serving") for one in contestants], "no checkpoint has such a way"
            )
        yield served
    finally:
        for worker in workers:
            worker.close()


class Memory:
    """Reading a buffer far larger than the caches, on huge pages as the engine's weights are, by functions of torch."""

    def __init__(self) -> None:
        self._x = torch.ones(1 << 15, 1 << 13)  # 1 GiB
        ask_for_huge_pages([self._x])
        self._vector = torch.ones(1 << 13)

    def bandwidth(self) -> dict[str, float]:
        """Returns bytes/s of each."""
        found = {}
        runs = {"sum": self._x.sum, "max": self._x.max, "matrix-vector": lambda: torch.mv(self._x, self._vector)}
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            found[name] = self._x.nbytes / (time.perf_counter() - begun)
        return found


def measure_group(dtype: str, checkpoints: list[Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the contestants of one precision in turn and returns a row for each of their batches and lengths."""
    times: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    bandwidths: dict[str, list[float]] = {}
    memory = Memory()
    pairs = list(itertools.product(options.batch_sizes, options.prompt_lengths))
    with started(list(specs(dtype, checkpoints, options))) as workers:
        counted = {
            (w.name, *pair): w.ask(*pair, options.new_tokens, 1) for w in workers if w.spec["program"] == "ours"
            for pair in pairs
        }  # fmt: skip
        for _ in range(options.rounds):
            for pair in pairs:
                for name, value in memory.bandwidth().items():
                    bandwidths.setdefault(name, []).append(value)
                for worker in workers:
                    times.setdefault((worker.name, *pair), []).append(worker.ask(*pair, options.new_tokens))
    bandwidth = max(statistics.median(values) for values in bandwidths.values())
    rows = []
    for pair in pairs:
        for worker in workers:
            key = (worker.name, *pair)
            first = next(w for w in workers if w.spec["program"] == "ours")
            row = _row(worker, pair, times[key], counted.get(key, counted[(first.name, *pair)]), bandwidth, options)
            row["same_tokens"] = _same(times[(first.name, *pair)][0]["tokens"], times[key][0]["tokens"])
            rows.append({"dtype": dtype, **row})
    return rows


def _same(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def _row(worker: Worker, pair: tuple[int, int], results: list[dict[str, Any]], counted: dict[str, Any],
         bandwidth: float, options: argparse.Namespace) -> dict[str, Any]:  # fmt: skip
    batch, length = pair
    step_s = statistics.median(r["rest_s"] for r in results) / (options.new_tokens - 1)
    row = {
        "contestant": worker.name, "serving": worker.info.get("serving", ""), "threads": options.threads,
        "version": worker.info["version"], "batch": batch, "prompt": length,
        "ms_per_token": step_s * 1e3, "tokens_per_s": batch / step_s,
        "prefill_ms": statistics.median(r["first_s"] for r in results) * 1e3,
    }  # fmt: skip
    path = worker.spec.get("checkpoint") or str(options.checkpoints[0])
    directory = _directory(Path(path))
    config = from_mapping(store.read_config(directory), str(directory))
    vocab = store.read_train_state(directory, ("vocab_size",))["vocab_size"]
    serving = worker.info.get("serving", "folded")
    hit = counted.get("distinct")
    bytes_read = step_bytes(config, vocab, batch, length + options.new_tokens / 2, serving, worker.spec["dtype"], hit)
    expected = step_bytes(config, vocab, batch, length + options.new_tokens / 2, serving, worker.spec["dtype"])
    return {
        **row, "experts_hit": hit,
        "experts_expected": None if hit is None else expected_distinct_experts(
            config.moe.num_experts, config.moe.moe_router_topk, batch
        ),
        "read_mb": bytes_read.total / 1e6, "read_mb_expected": expected.total / 1e6,
        "bandwidth_gb_s": bandwidth / 1e9, "floor_ms": bytes_read.total / bandwidth * 1e3,
        "share_of_floor": bytes_read.total / bandwidth / step_s,
        **{name: counted[name] for name in ("hits", "misses") if name in counted},
        "samples_ms": [round(r["rest_s"] / (options.new_tokens - 1) * 1e3, 3) for r in results],
    }  # fmt: skip


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws ms per token of every contestant over batch size, with the memory's floor, a panel for each precision."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    color_of = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row["contestant"] for row in rows))}
    batches = sorted({row["batch"] for row in rows})
    figure, panels = plt.subplots(1, len(dtypes), figsize=(5 * len(dtypes), 4), sharey=True, squeeze=False)
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        chosen = [row for row in rows if row["dtype"] == dtype and row["prompt"] == rows[0]["prompt"]]
        for name in dict.fromkeys(row["contestant"] for row in chosen):
            line = [row for row in chosen if row["contestant"] == name]
            axes.plot([r["batch"] for r in line], [r["ms_per_token"] for r in line], "o-", color=color_of[name],
                      label=name)  # fmt: skip
        line = [row for row in chosen if row["contestant"] == chosen[0]["contestant"]]
        axes.plot([r["batch"] for r in line], [r["floor_ms"] for r in line], "k--", label="memory's floor")
        axes.set(xscale="log", yscale="log", xlabel="batch", title=dtype)
        axes.set_xticks(batches, batches)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    panels[0][0].set_ylabel("ms per step")
    figure.savefig(path, dpi=110, bbox_inches="tight")


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Decoding steps of every precision, way of serving and checkpoint, beside their memory floor."""
    if "llama.cpp" in options.peers and not options.llama_python:
        raise ConfigError("--peers", "llama.cpp", "needs --llama-python, an interpreter with llama-cpp-python, gguf and "
                          "safetensors")  # fmt: skip
    if options.new_tokens < 2:
        raise ConfigError("--new-tokens", options.new_tokens, "must be 2 or more")
    options.threads = options.threads or torch.get_num_threads()
    options.checkpoints = options.load or [make_checkpoint(options)]
    if options.peers:
        make_exports(options.checkpoints[0], options)
    if options.prepare:
        print(f"prepared {', '.join(map(str, options.checkpoints))}")
        raise SystemExit(0)
    rows = [row for dtype in options.dtypes for row in measure_group(dtype, options.checkpoints, options)]
    if options.png:
        plot(rows, options.png)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    shown = ("dtype", "contestant", "serving", "batch", "prompt", "ms_per_token", "tokens_per_s", "prefill_ms", "experts_hit",
             "experts_expected", "read_mb", "floor_ms", "share_of_floor", "same_tokens")  # fmt: skip
    print(f"memory read at {rows[0]['bandwidth_gb_s']:.1f} GB/s")
    return [{name: "" if row.get(name) is None else row[name] for name in shown} for row in rows]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the subcommand `decode`, whose `run` gives rows for a table."""
    parser = commands.add_parser("decode", help="ms per token against the memory's floor and other programs")
    parser.set_defaults(run=run)
    parser.add_argument("--load", type=Path, nargs="+", help="checkpoints to compare; else a model of random weights")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-lengths", type=int, nargs="+", default=[32])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", choices=PRECISIONS, default=["fp32"])
    parser.add_argument("--servings", nargs="+", choices=SERVINGS, default=["auto"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[])
    parser.add_argument("--llama-python", help="interpreter with llama-cpp-python, gguf and safetensors")
    parser.add_argument("--transformers-experts", nargs="+", default=["default"], help="their experts_implementation")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/benchmark_decode"), help="for models and exports")
    parser.add_argument("--prepare", action="store_true", help="make models and exports, and measure nothing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    for name, size in (("num-layers", 12), ("hidden-size", 512), ("ffn-hidden-size", 2048), ("num-experts", 32),
                       ("topk", 2), ("vocab-size", 8192), ("num-expert-banks", 3), ("context", 512)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=size, help="of a model of random weights")
    parser.add_argument("--expert-layout", choices=["dense", "moe", "samoe"], default="moe")
    return parser


def main() -> int:
    """Runs the subcommand alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_parser(parser.add_subparsers(required=True))
    options = parser.parse_args()
    backend.keep_freed_memory()
    try:
        rows = options.run(options)
    except MegatronSamoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    body = [[f"{v:,.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    print(format_table([list(rows[0]), *body]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
