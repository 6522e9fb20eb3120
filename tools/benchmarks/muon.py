"""Optimizer steps of a model's weights by Muon and by AdamW, beside torch's Muon and bare products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_samoe.config.training import OptimizerConfig
from megatron_samoe.optimizer.muon import Muon, newton_schulz_flops
from megatron_samoe.optimizer.param_groups import build_param_groups
from megatron_samoe.parallel_state import single_process_state
from megatron_samoe.parallel_state.parameter_tag import tag_of
from megatron_samoe.training.setup import TrainSetup, build_setup
from tools.benchmarks.harness import ProcessBenchmark, Row, Rows, Run
from tools.benchmarks.models import ModelSizes

#: Side of the square matrices whose product is the limit.
SIDE = 1024
LR = 1e-4


@dataclass(frozen=True, kw_only=True)
class MuonBenchmark(ModelSizes, ProcessBenchmark):
    """optimizer steps of Muon and AdamW, and torch's Muon, all in turn; gradients given"""

    name = "muon"

    layout: Literal["dense", "moe", "samoe"] = "moe"
    """of the experts"""
    num_layers: int = 4
    num_experts: int = 16
    micro_batch_size: int = 1
    vocab_size: int = 2048

    def rows(self) -> Rows:
        ours = {
            "adam": self._setup(),
            "muon": self._setup(optimizer="muon"),
            "muon, bf16 products": self._setup(optimizer="muon", muon_ns_dtype="bf16"),
        }
        theirs, flops = _of_torch(ours["muon"])
        a = torch.randn(SIDE, SIDE)
        variants: dict[str, Run] = {name: partial(setup.optimizer.step, LR) for name, setup in ours.items()}
        medians = self.medians({**variants, "torch Muon": theirs, "products": lambda: a @ a})
        limit = flops / (2 * SIDE**3 / medians.pop("products"))

        def row(name: str, seconds: float) -> Row:
            is_muon = name != "adam"
            return {
                "optimizer": name,
                "ms": round(seconds * 1e3, 2),
                "GFLOP": round(flops / 1e9, 2) if is_muon else None,
                "share_of_fp32_products": round(limit / seconds, 3) if is_muon else None,
                "speed / torch Muon": round(medians["torch Muon"] / seconds, 2),
            }

        return [row(name, seconds) for name, seconds in medians.items()]

    def _setup(self, **optimizer: Any) -> TrainSetup:
        config = replace(self.config(self.layout, 1), optimizer=OptimizerConfig(lr=LR, **optimizer))
        setup = build_setup(config, self.vocab_size, single_process_state())
        for piece in setup.buffers.pieces:
            piece.grad.normal_()
        return setup


def _matrices(update: Muon, weight: Tensor, num_stacked: int) -> Iterator[Tensor]:
    """Yields the matrices of a weight that Muon makes orthogonal one by one."""
    for part in update.parts(weight):
        yield from part.flatten(num_stacked, -2).flatten(0, -3) if num_stacked else (part.flatten(0, -2),)


def _of_torch(setup: TrainSetup) -> tuple[Run, float]:
    """Returns a step of torch's Muon, each matrix a parameter of its own, and of its fused AdamW for the rest; and the
    multiply-adds x 2 of Newton-Schulz.
    """
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    flops, parameters = 0.0, setup.buffers.parameters
    for group in build_param_groups(parameters, setup.config.optimizer):
        for name in group.names:
            weight = parameters[name].detach()
            if isinstance(group.update, Muon):
                found = list(_matrices(group.update, weight, tag_of(parameters[name]).init.num_indexed_dims))
                flops += sum(newton_schulz_flops(m.shape[0], m.shape[1], group.update.num_steps) for m in found)
                matrices += found
            else:
                others.append(weight)
    # Memory of their own, or the two would move each other's weights.
    matrices, others = ([w.clone().requires_grad_() for w in some] for some in (matrices, others))
    for weight in [*matrices, *others]:
        weight.grad = torch.randn_like(weight)
    muon = torch.optim.Muon(matrices, lr=LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=LR, weight_decay=0.1, fused=True)

    def step() -> None:
        muon.step()
        adamw.step()

    return step, flops
