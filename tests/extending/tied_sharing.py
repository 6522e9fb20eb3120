"""A way of sharing: layers use one of a few sets of experts, by a map (Expert Tying, arXiv:2606.16825)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megatron_samoe.moe.experts import without_repeated_bias
from megatron_samoe.moe.sharing.expert_pool import ExpertPool
from megatron_samoe.moe.sharing.way import SharingContext
from megatron_samoe.moe.types import Experts
from megatron_samoe.ops.grouped_mlp import ExpertWeights, grouped_mlp


@dataclass(frozen=True)
class TiedSharing:
    """Layer l uses set `sets[l]`; see `way.SharingWay`."""

    context: SharingContext
    sets: Sequence[int] = (0, 1, 1, 2)

    def layer_part(self, moe_index: int) -> nn.Module:
        """Returns nothing: all experts are shared."""
        return nn.Module()

    def shared_part(self) -> ExpertPool:
        """Returns the sets, sharded over their holders."""
        return ExpertPool(self.context, self.context.shapes[0], num_banks=max(self.sets) + 1)

    def lender(self, layer_parts: Mapping[int, nn.Module], shared_part: ExpertPool) -> TiedLender:
        """Returns a lender of the sets."""
        return TiedLender(self, shared_part)


class TiedLender:
    """Lends sets; their gradients add up over layers and micro-batches, and are summed over ranks at a step's end."""

    def __init__(self, way: TiedSharing, pool: ExpertPool):
        self._way, self._pool = way, pool

    def begin_step(self) -> None:
        """Gathers the sets."""
        whole = ExpertWeights(**{name: store.whole() for name, store in self._pool.stores.items()})
        self._weights = whole.map(lambda t: t.to(self._way.context.dtype))
        self._grads = whole.map(torch.zeros_like)

    def experts(self, moe_index: int) -> Experts:
        """Returns a layer's experts."""
        number, state = self._way.sets[moe_index], self._way.context.state
        weights, grads = (
            without_repeated_bias(w.map(lambda t: t[number]), state) for w in (self._weights, self._grads)
        )
        return lambda x_RH, rows: grouped_mlp(x_RH, rows, weights, self._pool.activation, grads)

    def layer_gradients(self) -> None:
        """Layers add to one gradient."""

    def finish_step(self) -> None:
        """Adds this rank's gradients to the sets' main gradients."""
        for name, store in self._pool.stores.items():
            with store.gradient() as main_grad:
                main_grad += getattr(self._grads, name)
