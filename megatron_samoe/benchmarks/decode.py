"""Measures decoding: ms per token and tokens/s, the bytes that a step must read, and the memory's speed in the same run.

`benchmark.py decode` makes a model of random weights (1.2 G parameters by default), or takes checkpoints with
--load, and runs every precision and way of serving over batches and prompt lengths. With --peers it exports the model and
runs transformers' `generate` and llama.cpp over it in turn with ours. Contestants of one precision are processes that are
loaded together and asked one after another, round after round; medians are reported.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import shlex
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from megatron_samoe import children
from megatron_samoe.benchmarks.common import (
    MadeModel,
    Row,
    Rows,
    Times,
    Variants,
    add_command,
    add_sizes,
    medians_of,
    seconds_of,
    write_json,
)
from megatron_samoe.benchmarks.peers import LineWorker
from megatron_samoe.cli.arguments import Options
from megatron_samoe.config import DataConfig, ModelConfig, MoEConfig, PretrainConfig
from megatron_samoe.config.checkpoint import CheckpointConfig
from megatron_samoe.config.cli import from_mapping, parse_pretrain_args, to_mapping
from megatron_samoe.config.derived import flag
from megatron_samoe.config.idle import without_idle_options
from megatron_samoe.config.option import all_options
from megatron_samoe.config.validate import validate
from megatron_samoe.convert.hf.export import plan_export, write_export
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.global_tensors import CheckpointReader, StoredTensor, write_checkpoint
from megatron_samoe.errors import ConfigError, MegatronSamoeError
from megatron_samoe.inference.decode_bytes import expected_distinct_experts, step_bytes
from megatron_samoe.inference.engine import PRECISIONS, SERVINGS
from megatron_samoe.inference.huge_pages import ask_for_huge_pages
from megatron_samoe.models.rank_model import build_model
from megatron_samoe.parallel_state import single_process_state

WORKERS = Path(__file__).with_name("decode_workers.py")
PEERS = ("transformers", "llama.cpp")


#: A batch, and the length of its prompts.
Pair = tuple[int, int]


def make_checkpoint(options: Options, flags: str) -> Path:
    """Returns the folder of a model of random weights, made unless it is there.

    Args:
        flags: of pretraining, which say how the model differs from the others, in layout or sharing of experts.
    """
    heads = max(options.hidden_size // 64, 1)
    base = PretrainConfig(
        model=ModelConfig(
            num_layers=options.num_layers, hidden_size=options.hidden_size, ffn_hidden_size=options.ffn_hidden_size,
            num_attention_heads=heads, seq_length=options.context, position_embedding_type="rope", swiglu=True,
            normalization="RMSNorm", disable_bias_linear=True, untie_embeddings_and_output_weights=True,
            init_method_std=0.05,  # spread enough that greedy text does not repeat one token
        ),
        moe=MoEConfig("moe", num_experts=options.num_experts, moe_router_topk=options.topk,
                      moe_ffn_hidden_size=options.ffn_hidden_size),
        data=DataConfig(mock_data=True, tokenizer_type="ByteTokenizer"),
    )  # fmt: skip
    words = shlex.split(flags)
    asked = parse_pretrain_args(words, prog="--models", accept_idle=True)
    # What is asked for by name counts where it is the default, too: a dense model is one.
    named = {word.split("=")[0] for word in words}
    given = {n: value for _, n, value, default, _ in all_options(asked) if value != default or flag(n) in named}
    known = {f.name for f in fields(MoEConfig)}
    strange = [name for name in given if name not in known]
    if strange:
        raise ConfigError("--models", flags, f"may say what experts are; {flag(strange[0])} says something else")
    config = without_idle_options(replace(base, moe=replace(base.moe, **given)))
    validate(config, 1)
    sizes = (options.num_layers, options.hidden_size, options.ffn_hidden_size, options.num_experts, options.topk)
    name = re.sub(r"[^a-z0-9.]+", "-", flags.lower().replace("expert-layout", "").replace("expert-sharing", "")).strip(
        "-"
    )
    folder = options.work_dir / "-".join(map(str, (name or "moe", *sizes, options.vocab_size)))
    if not (folder / "checkpoint").exists():
        model = build_model(config, options.vocab_size, single_process_state())
        weights = {name: p.detach() for name, p in model.global_parameters().items()}
        state = {"iteration": 1, "consumed_samples": 0, "consumed_tokens": 0, "optimizer_steps": 0,
                 "vocab_size": options.vocab_size, "loss_scale": {"value": 1.0, "good_steps": 0, "growth_interval": 0}}  # fmt: skip
        tensors = {name: StoredTensor(tuple(t.shape), t.dtype) for name, t in weights.items()}
        made = MadeModel(tensors, to_mapping(config), state, weights.__getitem__)
        write_checkpoint(folder / "checkpoint", 1, made)
    return folder / "checkpoint"


@functools.cache
def checkpoint_directory(checkpoint: Path) -> Path:
    """Returns the folder of the newest whole iteration of a checkpoint."""
    wanted = CheckpointConfig(load=str(checkpoint), exit_on_missing_checkpoint=True)
    found = store.find_checkpoint(wanted, lambda d: store.damaged_files(d, single_process_state()))
    assert found is not None
    return found


def make_exports(checkpoint: Path, options: Options) -> Path:
    """Returns the folder with transformers' export of a checkpoint and llama.cpp's files, made unless there."""
    folder = options.work_dir / "exports" / checkpoint.resolve().as_posix().strip("/").replace("/", "-")
    if not (folder / "hf").exists():
        folder.mkdir(parents=True, exist_ok=True)
        source = CheckpointReader(checkpoint_directory(checkpoint))
        has_pool = from_mapping(source.config, str(checkpoint)).moe.shares_experts
        write_export(plan_export(source, fold=has_pool), folder / "hf")
    if "llama.cpp" in options.peers:
        for dtype in options.dtypes:
            path = folder / f"{dtype}.gguf"
            if not path.exists():
                command = [options.llama_python, str(WORKERS), "gguf", str(folder / "hf"), str(path), dtype]
                children.run(command, check=True)
    return folder


class Worker(LineWorker):
    """A contestant in a process of its own."""

    def __init__(self, name: str, python: str, spec: Row):
        self.spec = spec
        environment = {"OMP_NUM_THREADS": str(spec["threads"]), "TOKENIZERS_PARALLELISM": "false"}
        super().__init__(name, [python, str(WORKERS), json.dumps(spec)], environment)

    @property
    def is_ours(self) -> bool:
        """Whether it is the engine of this package."""
        return bool(self.spec["program"] == "ours")

    def measure(self, *numbers: int) -> Row:
        """Returns the answer to a line of numbers."""
        return self.ask(" ".join(map(str, numbers)))

    def ask(self, line: str) -> Row:
        answer = super().ask(line)
        if "err" in answer:
            raise MegatronSamoeError(f"{self.name} {answer['err']}; its message is above.")
        return answer


def specs(dtype: str, checkpoints: list[Path], options: Options) -> Iterator[tuple[str, str, Row]]:
    """Yields (name, interpreter, specification) of the contestants of one precision."""
    pairs = list(itertools.product(options.batch_sizes, options.prompt_lengths))
    common = {
        "threads": options.threads, "dtype": dtype, "max_batch": max(options.batch_sizes), "warm_up": pairs[-1:],
        "context": max(options.prompt_lengths) + options.new_tokens + 16,
        "step_tokens": max(512, *(batch * length for batch, length in pairs)),
    }  # fmt: skip
    for checkpoint, serving in itertools.product(checkpoints, options.servings):
        label = checkpoint.parent.name if checkpoint.name == "checkpoint" else str(checkpoint)
        yield f"{label} {serving}", sys.executable, {
            **common, "program": "ours", "checkpoint": str(checkpoint), "serving": serving,
            "weights_folder": options.weights_folder, "memory_limit": int(1e9 * options.memory_limit)}  # fmt: skip
    for peer, checkpoint in itertools.product(options.peers, checkpoints[:1]):
        exports = make_exports(checkpoint, options)
        if peer == "transformers" and dtype != "int8":
            for implementation in options.transformers_experts:
                yield f"transformers {implementation}", sys.executable, {
                    **common, "program": peer, "folder": str(exports / "hf"), "implementation": implementation}  # fmt: skip
        if peer == "llama.cpp":
            yield peer, options.llama_python, {**common, "program": peer, "file": str(exports / f"{dtype}.gguf")}


@contextmanager
def started(contestants: list[tuple[str, str, Row]]) -> Iterator[list[Worker]]:
    """Starts the contestants and ends them; ways of serving that a checkpoint lacks are left out, and that is said.

    Raises:
        ConfigError: no checkpoint can be served as asked.
    """
    workers: list[Worker] = []
    try:
        for one in contestants:
            worker = Worker(*one)
            workers.append(worker)
            if "err" in worker.facts:
                raise MegatronSamoeError(f"{worker.name} {worker.facts['err']}; its message is above.")
            if "refused" in worker.facts:
                print(f"left out: {worker.name}: {worker.facts['refused']}", file=sys.stderr)
        served = [worker for worker in workers if "refused" not in worker.facts]
        if not any(worker.is_ours for worker in served):
            raise ConfigError(
                "--servings", [spec.get("serving") for *_, spec in contestants], "no checkpoint has such a way"
            )
        yield served
    finally:
        for worker in workers:
            worker.close()


class Memory:
    """Reading a buffer far larger than the caches, on huge pages as the engine's weights are, by functions of torch."""

    def __init__(self) -> None:
        x = torch.ones(1 << 15, 1 << 13)  # 1 GiB
        ask_for_huge_pages([x])
        vector = torch.ones(1 << 13)
        self._num_bytes = x.nbytes
        self._reads: Variants = {"sum": x.sum, "max": x.max, "matrix-vector": lambda: torch.mv(x, vector)}
        self._times: Times = {name: [] for name in self._reads}

    def read(self) -> None:
        """Reads once in each way."""
        for name, read in self._reads.items():
            self._times[name].append(seconds_of(read))

    def bandwidth(self) -> float:
        """Returns bytes/s of the fastest way."""
        return self._num_bytes / min(medians_of(self._times).values())


def measure_group(dtype: str, checkpoints: list[Path], options: Options) -> Rows:
    """Runs the contestants of one precision in turn and returns a row for each of their batches and lengths."""
    times: dict[tuple[str, Pair], Rows] = {}
    memory = Memory()
    pairs: list[Pair] = list(itertools.product(options.batch_sizes, options.prompt_lengths))
    with started(list(specs(dtype, checkpoints, options))) as workers:
        counted = {
            (w.name, pair): w.measure(*pair, options.new_tokens, 1) for w in workers if w.is_ours for pair in pairs
        }
        for _, pair in itertools.product(range(options.rounds), pairs):
            memory.read()
            for worker in workers:
                times.setdefault((worker.name, pair), []).append(worker.measure(*pair, options.new_tokens))
    first = next(worker.name for worker in workers if worker.is_ours)
    rows = []
    for pair, worker in itertools.product(pairs, workers):
        results = times[worker.name, pair]
        row = _row(worker, pair, results, counted.get((worker.name, pair), counted[first, pair]), memory, options)
        row["same_tokens"] = _same(times[first, pair][0]["tokens"], results[0]["tokens"])
        rows.append({"dtype": dtype, **row})
    return rows


def _same(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


@functools.cache
def checkpoint_model(checkpoint: Path) -> tuple[PretrainConfig, int]:
    """Returns a checkpoint's configuration and size of vocabulary."""
    directory = checkpoint_directory(checkpoint)
    vocab_size: int = store.read_train_state(directory, ("vocab_size",))["vocab_size"]
    return from_mapping(store.read_config(directory), str(directory)), vocab_size


def _row(
    worker: Worker, pair: Pair, results: Rows, counted: Row, memory: Memory, options: Options
) -> Row:  # fmt: skip
    batch, length = pair
    samples_s = [result["rest_s"] / (options.new_tokens - 1) for result in results]
    step_s = statistics.median(samples_s)
    config, vocab = checkpoint_model(Path(worker.spec.get("checkpoint") or options.checkpoints[0]))
    serving, hit = worker.facts.get("serving", "folded"), counted.get("distinct")
    context, dtype, bandwidth = length + options.new_tokens / 2, worker.spec["dtype"], memory.bandwidth()
    num_bytes = step_bytes(config, vocab, batch, context, serving, dtype, hit).total
    moe = config.moe
    return {
        "contestant": worker.name, "serving": worker.facts.get("serving", ""), "threads": options.threads,
        "version": worker.facts["version"], "batch": batch, "prompt": length,
        "ms_per_token": step_s * 1e3, "tokens_per_s": batch / step_s,
        "prefill_ms": statistics.median(result["first_s"] for result in results) * 1e3, "experts_hit": hit,
        "experts_expected": None if hit is None else statistics.mean(
            expected_distinct_experts(count, moe.moe_router_topk, batch) for count in moe.expert_counts
        ),
        "read_mb": num_bytes / 1e6,
        "read_mb_expected": step_bytes(config, vocab, batch, context, serving, dtype).total / 1e6,
        "bandwidth_gb_s": bandwidth / 1e9, "floor_ms": num_bytes / bandwidth * 1e3,
        "share_of_floor": num_bytes / bandwidth / step_s,
        **{name: counted[name] for name in ("hits", "misses") if name in counted},
        "samples_ms": [round(sample * 1e3, 3) for sample in samples_s],
    }  # fmt: skip


def plot(rows: Rows, path: Path) -> None:
    """Draws ms per token of every contestant over batch size, with the memory's floor, a panel for each precision."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    color_of = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row["contestant"] for row in rows))}
    batches = sorted({row["batch"] for row in rows})
    figure, panels = plt.subplots(1, len(dtypes), figsize=(5 * len(dtypes), 4), sharey=True, squeeze=False)
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        lines: dict[str, Rows] = {}
        for row in rows:
            if row["dtype"] == dtype and row["prompt"] == rows[0]["prompt"]:
                lines.setdefault(row["contestant"], []).append(row)
        for name, line in lines.items():
            axes.plot([r["batch"] for r in line], [r["ms_per_token"] for r in line], "o-", color=color_of[name],
                      label=name)  # fmt: skip
        line = next(iter(lines.values()))
        axes.plot([r["batch"] for r in line], [r["floor_ms"] for r in line], "k--", label="memory's floor")
        axes.set(xscale="log", yscale="log", xlabel="batch", title=dtype)
        axes.set_xticks(batches, batches)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    panels[0][0].set_ylabel("ms per step")
    figure.savefig(path, dpi=110, bbox_inches="tight")


#: Columns of the table; the JSON file has all.
SHOWN = ("dtype", "contestant", "serving", "batch", "prompt", "ms_per_token", "tokens_per_s", "prefill_ms", "experts_hit",
         "experts_expected", "read_mb", "floor_ms", "share_of_floor", "same_tokens")  # fmt: skip


def run(options: Options) -> Rows:
    """Decoding steps of every precision, way of serving and checkpoint, beside their memory floor."""
    if "llama.cpp" in options.peers and not options.llama_python:
        raise ConfigError("--peers", "llama.cpp", "needs --llama-python, an interpreter with llama-cpp-python, gguf and "
                          "safetensors")  # fmt: skip
    if options.new_tokens < 2:
        raise ConfigError("--new-tokens", options.new_tokens, "must be 2 or more")
    options.threads = options.threads or torch.get_num_threads()
    if options.memory_limit and not options.weights_folder:
        raise ConfigError(
            "--memory-limit", options.memory_limit, "needs --weights-folder: other weights cannot leave memory"
        )
    options.checkpoints = options.load or [make_checkpoint(options, flags) for flags in options.models]
    if options.peers:
        make_exports(options.checkpoints[0], options)
    if options.prepare:
        print(f"prepared {', '.join(map(str, options.checkpoints))}")
        raise SystemExit(0)
    rows = [row for dtype in options.dtypes for row in measure_group(dtype, options.checkpoints, options)]
    if options.png:
        plot(rows, options.png)
    write_json(options.json, rows)
    print(f"memory read at {rows[0]['bandwidth_gb_s']:.1f} GB/s")
    return [{name: row.get(name) for name in SHOWN} for row in rows]


def add_parser(commands: Any) -> None:
    """Adds the subcommand `decode`, whose `run` gives rows for a table."""
    add = add_command(commands, "decode", "ms per token against the memory's floor and other programs", run)
    add("--load", [Path], "checkpoints to compare; else a model of random weights")
    add("--batch-sizes", [1, 8, 32])
    add("--prompt-lengths", [32])
    add("--new-tokens", 64)
    add("--dtypes", [PRECISIONS], default=["fp32"])
    add("--servings", [SERVINGS], default=["auto"])
    add("--rounds", 5)
    add("--threads", int, "default: all cores")
    add("--peers", [PEERS], nargs="*", default=[])
    add("--llama-python", str, "interpreter with llama-cpp-python, gguf and safetensors")
    add("--transformers-experts", ["default"], "their experts_implementation")
    add("--work-dir", Path("runs/benchmark_decode"), "for models and exports")
    add("--prepare", bool, "make models and exports, and measure nothing")
    add("--json", Path)
    add("--png", Path)
    add_sizes(add, "of a model of random weights", num_layers=12, hidden_size=512, ffn_hidden_size=2048, num_experts=32,
              topk=2, vocab_size=8192, context=512)  # fmt: skip
    add(
        "--models",
        [""],
        "models of random weights: for each, flags of pretraining that say what its experts are, such as "
        "'--expert-layout samoe --num-expert-banks 3' or '--expert-sharing pool --num-experts 96'; a standard MoE if empty",
    )
    add("--weights-folder", str, "keep weights in files there, which Linux may drop from memory", metavar="DIR")
    add(
        "--memory-limit",
        0.0,
        "GB that each contestant of ours may hold of what it reads while it decodes, by a control group; 0 for "
        "no limit",
        metavar="GB",
    )
