"""Loads of shared sets of experts over all layers, as the balance loss of each of these layers needs them.

The loss of a set that L layers use is, for each sequence (UniPool, arXiv:2605.06665, with the load of the same tokens),

    E * sum_e f_e * sum_l P[l, e],      f_e = (slots of all L layers that chose e) / (S * K * L)

with P[l, e] the mean score of expert e in layer l. Early layers cannot know f when they run. So counts travel with the
activations, each layer adding its own; the sum turns around where the layers end and comes back with the gradients, and
each layer forms the gradient of its scores from it. Between pipeline stages counts are a few more rows of the message.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.config.sharing_map import ExpertSource


@dataclass(frozen=True)
class SetColumns:
    """The columns of one layer's set in a row of all sets' loads, and how many layers use the set."""

    start: int
    stop: int
    num_layers: int


@dataclass(frozen=True)
class SetLoads:
    """The loads of all sets of a model: loads_BC has a row for each sequence, and a column for each expert of each set.

    Attributes:
        columns: of each MoE layer; None for a layer that shares no set.
        width: C.
    """

    columns: tuple[SetColumns | None, ...]
    width: int

    @staticmethod
    def of(sources: Sequence[ExpertSource], num_experts: Sequence[int]) -> SetLoads:
        """Returns the columns of the loads of MoE layers with these sources and numbers of experts."""
        starts: dict[ExpertSource, int] = {}
        width = 0
        for source, experts in zip(sources, num_experts, strict=True):
            if source.way.in_sets and source not in starts:
                starts[source] = width
                width += experts
        columns = tuple(
            SetColumns(starts[source], starts[source] + experts, sources.count(source)) if source in starts else None
            for source, experts in zip(sources, num_experts, strict=True)
        )
        return SetLoads(columns, width)

    def zeros(self, batch_size: int, like: Tensor) -> Tensor:
        """Returns loads_BC before the first layer, in fp32 or fp64."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.zeros(batch_size, self.width, dtype=dtype, device=like.device)

    def num_rows(self, batch_size: int, hidden_size: int, dtype: torch.dtype) -> int:
        """Returns the rows [H] that loads take in a message."""
        width = torch.promote_types(dtype, torch.float32).itemsize // dtype.itemsize
        return math.ceil(batch_size * self.width * width / hidden_size)

    def pack(self, x_TH: Tensor, loads_BC: Tensor) -> Tensor:
        """Returns a message: x_TH, and below it the loads, bit by bit."""
        return _Pack.apply(x_TH, loads_BC)

    def unpack(self, message: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """Returns x_TH and loads_BC of a message."""
        rows = self.num_rows(batch_size, message.shape[1], message.dtype)
        return _Unpack.apply(message, rows, (batch_size, self.width))


def count(loads_BC: Tensor, columns: SetColumns, counts_BE: Tensor, score_sum_BE: Tensor, factor: float) -> Tensor:
    """Returns the loads with a layer's added. Its scores get `factor` times the loads of all layers as their gradient."""
    return _Count.apply(loads_BC, score_sum_BE, counts_BE, columns, factor)


def turn_around(x_TH: Tensor, loads_BC: Tensor) -> Tensor:
    """Returns x_TH, after the last layer; in the backward pass the loads come back as their own gradient."""
    return _TurnAround.apply(x_TH, loads_BC)


class _Count(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, loads_BC: Tensor, score_sum_BE: Tensor, counts_BE: Tensor, columns: SetColumns, factor: float
    ) -> Tensor:
        ctx.columns, ctx.factor, ctx.dtype = columns, factor, score_sum_BE.dtype
        loads_BC = loads_BC.clone()
        loads_BC[:, columns.start : columns.stop] += counts_BE
        return loads_BC

    @staticmethod
    def backward(ctx: Any, all_BC: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        all_BE = all_BC[:, ctx.columns.start : ctx.columns.stop]
        return all_BC, (ctx.factor * all_BE).to(ctx.dtype), None, None, None


class _TurnAround(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, loads_BC: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(loads_BC)
        return x_TH.view_as(x_TH)

    @staticmethod
    def backward(ctx: Any, dx_TH: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return dx_TH, ctx.saved_tensors[0]


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, loads_BC: Tensor) -> Tensor:  # type: ignore[override]
        ctx.tokens, ctx.shape, ctx.dtype = len(x_TH), loads_BC.shape, loads_BC.dtype
        return _with_bits(x_TH, loads_BC)

    @staticmethod
    def backward(ctx: Any, message: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return message[: ctx.tokens], _read_bits(message[ctx.tokens :], ctx.shape, ctx.dtype)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, message: Tensor, rows: int, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        tokens = len(message) - rows
        dtype = torch.promote_types(message.dtype, torch.float32)
        return message[:tokens].clone(), _read_bits(message[tokens:], shape, dtype)

    @staticmethod
    def backward(ctx: Any, dx_TH: Tensor, all_BC: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _with_bits(dx_TH, all_BC), None, None


def _with_bits(x_TH: Tensor, loads_BC: Tensor) -> Tensor:
    bits = loads_BC.contiguous().view(-1).view(x_TH.dtype)
    padding = bits.new_zeros(-len(bits) % x_TH.shape[1])
    return torch.cat((x_TH, torch.cat((bits, padding)).view(-1, x_TH.shape[1])))


def _read_bits(rows: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = math.prod(shape) * dtype.itemsize // rows.dtype.itemsize
    return rows.reshape(-1)[:count].clone().view(dtype).view(shape)
