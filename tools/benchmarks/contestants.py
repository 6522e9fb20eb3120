"""One model in several programs that decode: processes that are loaded together and asked in turn, round after round."""

from __future__ import annotations

import functools
import itertools
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_samoe.config import DataConfig, ModelConfig, MoEConfig, PretrainConfig
from megatron_samoe.config.cli import from_mapping, parse, to_mapping
from megatron_samoe.config.derived import flag
from megatron_samoe.config.option import all_options
from megatron_samoe.config.validate import validate, without_idle_options
from megatron_samoe.convert.edited_model import EditedModel
from megatron_samoe.convert.gguf import export as gguf
from megatron_samoe.convert.hf.export import plan_export, write_export
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors, write_checkpoint
from megatron_samoe.errors import ConfigError, MegatronSamoeError
from megatron_samoe.models.rank_model import build_model
from megatron_samoe.optimizer.mixed_precision import LossScale
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.training.state import TrainState
from tools.benchmarks.harness import Row, Rows, TableBenchmark
from tools.benchmarks.peers import LineWorker

ROOT = Path(__file__).parents[2]


def workers_of(checkout: Path) -> Path:
    """Returns the program that a checkout of this project starts for each contestant."""
    return checkout / "tools/benchmarks/serving_workers.py"


#: A batch, and the length of its prompts.
Pair = tuple[int, int]


class Contestant(NamedTuple):
    """A program over a model: how it is called, its interpreter, what serving_workers.py is told, and whose serving_workers.py."""

    name: str
    python: str
    spec: Row
    checkout: Path = ROOT


class Worker(LineWorker):
    """A contestant in a process of its own."""

    def __init__(self, one: Contestant):
        self.spec = one.spec
        environment = {"OMP_NUM_THREADS": str(one.spec["threads"]), "TOKENIZERS_PARALLELISM": "false"}
        super().__init__(one.name, [one.python, str(workers_of(one.checkout)), json.dumps(one.spec)], environment)

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


@contextmanager
def started(contestants: Sequence[Contestant]) -> Iterator[list[Worker]]:
    """Starts the contestants and ends them; ways of serving that a checkpoint lacks are left out, and that is said.

    Raises:
        ConfigError: no checkpoint can be served as asked.
    """
    workers: list[Worker] = []
    try:
        for one in contestants:
            worker = Worker(one)
            workers.append(worker)
            if "err" in worker.facts:
                raise MegatronSamoeError(f"{worker.name} {worker.facts['err']}; its message is above.")
            if "refused" in worker.facts:
                print(f"left out: {worker.name}: {worker.facts['refused']}", file=sys.stderr)
        served = [worker for worker in workers if "refused" not in worker.facts]
        if not any(worker.is_ours for worker in served):
            asked = [one.spec.get("serving") for one in contestants]
            raise ConfigError("--servings", asked, "no checkpoint has such a way")
        yield served
    finally:
        for worker in workers:
            worker.close()


@functools.cache
def opened(checkpoint: Path) -> GlobalTensors:
    """Returns the newest whole iteration of a checkpoint."""
    return open_folder(checkpoint).tensors


@functools.cache
def checkpoint_model(checkpoint: Path) -> tuple[PretrainConfig, int]:
    """Returns a checkpoint's configuration and size of vocabulary."""
    source = opened(checkpoint)
    return from_mapping(source.config, str(checkpoint)), source.train_state["vocab_size"]


def label(checkpoint: Path) -> str:
    """Returns how a checkpoint is called in tables."""
    return checkpoint.parent.name if checkpoint.name == "checkpoint" else str(checkpoint)


@dataclass(frozen=True, kw_only=True)
class ServingBenchmark(TableBenchmark):
    """One of programs that decode a model of random weights, or checkpoints."""

    load: tuple[Path, ...] = ()
    """checkpoints to compare; else models of random weights"""
    models: tuple[str, ...] = ("",)
    """models of random weights: for each, flags of pretraining that say what its experts are, such as '--expert-layout samoe
    --num-expert-banks 3' or '--expert-sharing pool --num-experts 96'; a standard MoE if empty"""
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    prompt_lengths: tuple[int, ...] = (32,)
    """prompts are of random tokens"""
    new_tokens: int = 64
    threads: int | None = None
    """default: all cores"""
    work_dir: Path = Path("runs/benchmark_decode")
    """for models and exports"""
    num_layers: int = 12
    """of a model of random weights, as the sizes below"""
    hidden_size: int = 512
    ffn_hidden_size: int = 2048
    num_experts: int = 32
    topk: int = 2
    vocab_size: int = 8192
    context: int = 512

    @property
    def pairs(self) -> list[Pair]:
        """Batches and lengths of prompts."""
        return list(itertools.product(self.batch_sizes, self.prompt_lengths))

    def checkpoints(self) -> list[Path]:
        """Returns the checkpoints, those of random weights made unless they are there."""
        if self.new_tokens < 2:
            raise ConfigError("--new-tokens", self.new_tokens, "must be 2 or more")
        found = list(self.load) or [self.make_checkpoint(flags) for flags in self.models]
        longest = min(checkpoint_model(path)[0].model.max_positions for path in found) - max(self.prompt_lengths)
        if self.new_tokens > longest:
            raise ConfigError("--new-tokens", self.new_tokens, f"at most {longest}, for which a model has positions")
        return found

    def make_checkpoint(self, flags: str) -> Path:
        """Returns the folder of a model of random weights, made unless it is there.

        Args:
            flags: of pretraining, which say how the model differs from the others, in layout or sharing of experts.
        """
        sizes = (self.num_layers, self.hidden_size, self.ffn_hidden_size, self.num_experts, self.topk, self.vocab_size)
        words = re.sub(r"[^a-z0-9.]+", "-", re.sub("expert-layout|expert-sharing", "", flags.lower())).strip("-")
        folder = self.work_dir / "-".join(map(str, (words or "moe", *sizes)))
        config = self._config(flags)
        if not (folder / "checkpoint").exists():
            model = build_model(config, self.vocab_size, single_process_state())
            state = TrainState(1, 0, 0, LossScale.of(config.training)).plain()
            made = EditedModel(to_mapping(config), {**state, "vocab_size": self.vocab_size, "optimizer_steps": 0})
            for name, weight in model.global_parameters().items():
                made.add_value(name, weight.detach())
            write_checkpoint(folder / "checkpoint", 1, made)
        return folder / "checkpoint"

    def _config(self, flags: str) -> PretrainConfig:
        model = ModelConfig(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=max(self.hidden_size // 64, 1),
            seq_length=self.context,
            position_embedding_type="rope",
            swiglu=True,
            normalization="RMSNorm",
            disable_bias_linear=True,
            untie_embeddings_and_output_weights=True,
            init_method_std=0.05,  # spread enough that greedy text does not repeat one token
        )
        usual = MoEConfig(
            "moe", num_experts=self.num_experts, moe_router_topk=self.topk, moe_ffn_hidden_size=self.ffn_hidden_size
        )
        words = shlex.split(flags)
        asked = parse(words, prog="--models").config
        # What is asked for by name counts where it is the default, too: a dense model is one.
        named = {word.split("=")[0] for word in words}
        given = {n: value for _, n, value, default, _ in all_options(asked) if value != default or flag(n) in named}
        known = {f.name for f in fields(MoEConfig)}
        strange = [name for name in given if name not in known]
        if strange:
            raise ConfigError("--models", flags, f"may say what experts are; {flag(strange[0])} says something else")
        data = DataConfig(mock_data=True, tokenizer_type="ByteTokenizer")
        config = without_idle_options(PretrainConfig(model=model, moe=replace(usual, **given), data=data))
        validate(config, 1)
        return config

    def common_spec(self, dtype: str) -> Row:
        """Returns what every contestant of a precision is told."""
        batch, longest = max(self.batch_sizes), max(self.prompt_lengths)
        return {
            "threads": self.threads or torch.get_num_threads(),
            "dtype": dtype,
            "max_batch": batch,
            "warm_up": self.pairs[-1:],
            "context": longest + self.new_tokens + 16,
            "step_tokens": max(512, batch * longest),
        }

    def measure(self, workers: Sequence[Worker]) -> Iterator[tuple[Pair, Worker, Row]]:
        """Yields what contestants answer, in turn, round after round; another begins each round, so that no place in it favours one."""
        for turn, pair in itertools.product(range(self.rounds), self.pairs):
            first = turn % len(workers)
            for worker in (*workers[first:], *workers[:first]):
                yield pair, worker, worker.measure(*pair, self.new_tokens)

    def step_seconds(self, results: Rows) -> list[float]:
        """Returns the seconds of a step in each round."""
        return [result["rest_s"] / (self.new_tokens - 1) for result in results]

    def export_folder(self, checkpoint: Path) -> Path:
        """Returns the folder of a checkpoint's exports."""
        return self.work_dir / "exports" / checkpoint.resolve().as_posix().strip("/").replace("/", "-")


def export_hf(checkpoint: Path, folder: Path) -> Path:
    """Returns transformers' folder of a checkpoint, made unless it is there; what layers share is folded into each one's own."""
    target = folder / "hf-folded"
    if not target.exists():
        source = opened(checkpoint)
        folder.mkdir(parents=True, exist_ok=True)
        write_export(plan_export(source, fold=checkpoint_model(checkpoint)[0].moe.shares_experts), target)
    return target


def export_gguf(checkpoint: Path, folder: Path, dtype: torch.dtype) -> Path:
    """Returns llama.cpp's file of a checkpoint in a dtype, made unless it is there; ConfigError where llama.cpp has no such model."""
    target = folder / f"gguf-{dtype}"
    if not target.exists():
        source = opened(checkpoint)
        folder.mkdir(parents=True, exist_ok=True)
        gguf.write_export(gguf.plan_export(source, None, dtype), target)
    return target / gguf.FILE
