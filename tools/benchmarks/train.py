"""Whole optimizer steps of dense, MoE and SaMoE models with equal active parameters."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Literal

import torch

from megatron_samoe.config import PretrainConfig
from megatron_samoe.parallel_state import backend, single_process_state
from megatron_samoe.planning.accounting import count_parameters, train_flops_per_token
from megatron_samoe.training.setup import build_setup, initial_state
from megatron_samoe.training.train_step import train_step
from tools.benchmarks.harness import DTYPES, Dtype, Row, Rows, Run, process_status_kb
from tools.benchmarks.layer import LayerShape, products
from tools.benchmarks.models import ModelSizes
from tools.benchmarks.peers import PeerBenchmark


@dataclass(frozen=True, kw_only=True)
class TrainStep(ModelSizes, PeerBenchmark):
    """optimizer steps of whole models

    All layouts and optimizers in turn, and peers where a folder is given; memory each in a process of its own.
    """

    name = "train-step"

    layouts: tuple[Literal["dense", "moe", "samoe"], ...] = ("dense", "moe", "samoe")
    optimizers: tuple[Literal["adam", "muon"], ...] = ("adam",)
    """each layout is trained by each"""
    dtype: tuple[Dtype, ...] = ("fp32",)
    swiglu: bool = False
    """gated MLPs without biases, as Mixtral's"""
    samoe_combine: Literal["step", "layer"] = "step"
    """as the pretrain program's"""
    seq_length: int = 256
    micro_batch_size: int = 8
    num_micro_batches: int = 1
    vocab_size: int = 8192
    hidden_size: int = 384
    ffn_hidden_size: int = 1536
    num_experts: int = 16
    topk: int = 1
    moe_ffn_hidden_size: int | None = None
    """width of an expert; the dense MLP's if not given"""

    def rows(self) -> Rows:
        return [row for dtype in self.dtype for row in self._rows(dtype)]

    def _rows(self, dtype: str) -> Rows:
        models = [layout if o == "adam" else f"{layout}, {o}" for layout in self.layouts for o in self.optimizers]
        configs = {model: self.model(model, dtype) for model in models}
        micro_rows, ffn = self.micro_batch_size * self.seq_length, self.ffn_hidden_size
        variants: dict[str, Run] = {model: self._step(config) for model, config in configs.items()}
        variants["dense products"] = products(LayerShape(micro_rows, self.hidden_size, ffn, 1, 1, dtype=DTYPES[dtype]))
        names = [f"moe:grouped_mm:k={self.topk}:fused" + (":bf16" if dtype == "bf16" else "")]
        sizes = {"L": self.num_layers, "H": self.hidden_size, "F": ffn, "heads": self.hidden_size // 64}
        sizes |= {"E": self.num_experts, "V": self.vocab_size, "S": self.seq_length, "B": self.micro_batch_size}
        with self.running("w2_train_step.py", names, sizes) as peers:
            medians = self.medians({**variants, **{peer.name: peer.seconds for peer in peers}})
            # Not what they say: their ru_maxrss begins with what this process held.
            peer_memory = {peer.name: round(process_status_kb("VmHWM", peer.process.pid) / 1024) for peer in peers}
        ceiling = 6 * 2 * micro_rows * self.hidden_size * ffn / medians.pop("dense products")
        tokens, first = micro_rows * self.num_micro_batches, medians[models[0]]

        def row(name: str, seconds: float) -> Row:
            ours: Row = {"parameters": None, "active": None}
            share, memory = None, peer_memory.get(name)
            if name in configs:
                count = count_parameters(configs[name], self.vocab_size)
                ours = {"parameters": count.total, "active": count.active}
                flops = train_flops_per_token(configs[name], self.vocab_size)
                share, memory = round(tokens / seconds * flops / ceiling, 3), round(self._peak_megabytes(configs[name]))
            speed = {"tokens:s": round(tokens / seconds, 1), "share_of_dense_products": share}
            speed[f"speed / {models[0]}"] = round(first / seconds, 3)
            return {"model": name, "dtype": dtype, **ours, **speed, "peak_mb": memory}

        return [row(name, seconds) for name, seconds in medians.items()]

    def model(self, model: str, dtype: str) -> PretrainConfig:
        """Returns a model, "layout" or "layout, optimizer"; a SaMoE has a bank for four layers."""
        layout, _, optimizer = model.partition(", ")
        config = self.config(
            layout,
            self.num_micro_batches,
            moe_router_topk=self.topk,
            moe_ffn_hidden_size=self.moe_ffn_hidden_size or self.ffn_hidden_size,
            samoe_combine=self.samoe_combine if layout == "samoe" else None,
        )
        return replace(
            config,
            model=replace(
                config.model, ffn_hidden_size=self.ffn_hidden_size, swiglu=self.swiglu, disable_bias_linear=self.swiglu
            ),
            training=replace(config.training, bf16=dtype == "bf16"),
            optimizer=replace(config.optimizer, optimizer="muon" if optimizer == "muon" else "adam"),
        )

    def _step(self, config: PretrainConfig) -> Run:
        """Returns a run of one optimizer step."""
        setup = build_setup(config, self.vocab_size, single_process_state())
        shape = (self.micro_batch_size, self.seq_length)
        batch = {
            "tokens": torch.randint(self.vocab_size, shape),
            "labels": torch.randint(self.vocab_size, shape),
            "loss_mask": torch.ones(shape),
        }
        return partial(train_step, setup, initial_state(setup), [batch] * self.num_micro_batches)

    def _peak_megabytes(self, config: PretrainConfig) -> float:
        """Returns the most memory that a process of its own holds over two steps."""
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            return alone.submit(self._peak, config).result()

    def _peak(self, config: PretrainConfig) -> float:
        backend.keep_freed_memory()
        torch.set_num_threads(torch.get_num_threads() if self.threads is None else self.threads)
        step = self._step(config)
        for _ in range(2):
            step()
        # Not ru_maxrss: it begins with what the parent held.
        return process_status_kb("VmHWM") / 1024
