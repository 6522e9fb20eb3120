"""Values handed between the phases of an MoE layer, and between layers and the training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_samoe.moe.experts import ExpertShape
from megatron_samoe.moe.set_loads import SetColumns
from megatron_samoe.moved import names_moved
from megatron_samoe.ops.attention import ScoreRule
from megatron_samoe.ops.grouped_mlp import Counts
from megatron_samoe.tensor_parallel.random import SampleRandom


class KeyValueCache(Protocol):
    """Keys and values of earlier tokens, for a forward pass over the new ones only."""

    def attend(self, layer: int, q_TAD: Tensor, k_TGD: Tensor, v_TGD: Tensor, rule: ScoreRule) -> Tensor:
        """Stores the new tokens' keys and values; returns attention's output over all of their sequences, [T, A * D]."""
        ...


@dataclass(frozen=True)
class ForwardContext:
    """The context of a forward pass: all that it needs except its tokens.

    Attributes:
        batch_size: B, sequences in the micro-batch.
        training: apply dropout, jitter and expert capacity, and attach auxiliary losses.
        tokens_per_step: tokens of the global batch, by which auxiliary losses are divided.
        gradient_scale: factor on all losses (the loss scale of fp16).
        random: source of noise; required while training.
        cache: where given, the tokens continue sequences whose earlier tokens it holds.
        fuses_loss: the last stage leaves logits to the loss, which makes them for some tokens at a time.
    """

    batch_size: int
    training: bool = False
    tokens_per_step: int = 1
    gradient_scale: float = 1.0
    random: SampleRandom | None = None
    cache: KeyValueCache | None = None
    fuses_loss: bool = False


@dataclass(frozen=True)
class MoELayerSpec:
    """One MoE layer of the model.

    Attributes:
        layer, moe_index: its index among all layers, which seeds noise, and among MoE layers.
        shape: global sizes of its routed experts.
        router_init_std: spread of the router's first weights.
        set_columns: columns of its set's loads, where those are balanced over all layers that use the set.
    """

    layer: int
    moe_index: int
    shape: ExpertShape
    router_init_std: float
    set_columns: SetColumns | None = None


@dataclass(frozen=True)
class MoEStats:
    """Sums over the micro-batch's tokens of one MoE layer, detached; sums of sums describe a global batch.

    Attributes:
        moe_index: of the layer, among all MoE layers.
        sums: by name, as the model's `StatisticsLayout` lists them.
    """

    moe_index: int
    sums: Mapping[str, Tensor]


@dataclass(frozen=True)
class StatisticsLayout:
    """The columns of named statistics in one row per MoE layer, so that all layers' sums travel in one tensor.

    Attributes:
        sizes: numbers of each statistic, the same for all layers of a model.
    """

    sizes: Mapping[str, int]

    def zeros(self, num_layers: int, device: torch.device) -> Tensor:
        """Returns rows [L, all sizes] in fp64."""
        return torch.zeros(num_layers, sum(self.sizes.values()), dtype=torch.float64, device=device)

    def add(self, rows: Tensor, stats: MoEStats) -> None:
        """Adds one layer's sums to its row; a layer with fewer experts than others leaves the rest at zero.

        Raises:
            ValueError: the sums are not those that were declared.
        """
        if stats.sums.keys() != self.sizes.keys():
            raise ValueError(f"statistics {sorted(stats.sums)} were reported, {sorted(self.sizes)} were declared")
        start = 0
        for name, size in self.sizes.items():
            values = stats.sums[name].reshape(-1)
            if len(values) > size or (len(values) < size and name != "counts"):
                raise ValueError(f"statistic {name} has {len(values)} numbers; {size} were declared")
            rows[stats.moe_index, start : start + len(values)] += values
            start += size

    def named(self, rows: Tensor) -> dict[str, Tensor]:
        """Returns [L, size] by name."""
        return dict(zip(self.sizes, rows.split(tuple(self.sizes.values()), dim=1), strict=True))


class Experts(Protocol):
    """The experts of one layer on one rank, wherever their weights come from."""

    def __call__(self, x_RH: Tensor, rows_per_expert: Counts) -> Tensor:
        """Returns y_RH for rows sorted by local expert; with expert tensor parallelism a part of a sum over ranks.

        Args:
            rows_per_expert: e counts, on the device of x; see `ops.grouped_mlp`.
        """
        ...


__getattr__ = names_moved(__name__, {"MoEPlace": MoELayerSpec})
