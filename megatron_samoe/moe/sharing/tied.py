"""Layers use a set of experts together (Expert Tying, arXiv:2606.16825); a pool is one set for all layers.

A set's weights do not change within an optimizer step: a sharded one is gathered at its start. Its gradient is the sum
over the layers that use it, over their micro-batches and over ranks, which is taken once, at the step's end.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_samoe.moe.experts import without_repeated_bias
from megatron_samoe.moe.sharing.expert_pool import FP32_BYTES, ExpertPool
from megatron_samoe.moe.sharing.way import ExpertLender, LenderCosts, Mixture, SharingContext
from megatron_samoe.moe.types import Experts
from megatron_samoe.ops.grouped_mlp import Counts, ExpertWeights, grouped_mlp


class TiedSharing:
    """All layers use one set; see `way.SharingWay`."""

    def __init__(self, context: SharingContext):
        self._context = context

    def layer_part(self, moe_index: int) -> nn.Module:
        """Returns nothing: all experts are shared."""
        return nn.Module()

    def shared_part(self) -> ExpertPool | None:
        """Returns the set as the only bank; nothing where it belongs to another pipeline stage, the only one to use it."""
        context = self._context
        stages = context.stages_of(range(len(context.shapes)))
        is_here = len(stages) > 1 or context.state.pp.rank in stages
        return ExpertPool(context, context.shapes[0], 1, on_one_stage=len(stages) == 1) if is_here else None

    def lender(self, layer_parts: Mapping[int, nn.Module], shared_part: nn.Module | None) -> TiedLender:
        """Returns a lender of the set."""
        assert isinstance(shared_part, ExpertPool)
        return TiedLender(shared_part, bool(layer_parts), self._context)

    def mixture(self, moe_index: int, layer_part: nn.Module, shared_part: nn.Module | None) -> Mixture:
        """Returns the set as it is."""
        assert isinstance(shared_part, ExpertPool)
        return Mixture(shared_part)


class TiedLender(ExpertLender):
    """Lends a set; see `way.ExpertLender`.

    Args:
        is_used: whether layers of this rank use the set, which it may hold for others.
    """

    def __init__(self, pool: ExpertPool, is_used: bool, context: SharingContext):
        self._pool, self._is_used = pool, is_used
        self._state, self._dtype = context.state, context.dtype
        self._weights: ExpertWeights | None = None
        self._grads: ExpertWeights | None = None

    @torch.no_grad()
    def begin_step(self) -> None:
        """Takes in the set; holders of a sharded one gather it together."""
        weights = self._pool.unsharded()
        if self._is_used:
            self._weights = weights.map(lambda t: t[0].to(self._dtype))

    def experts(self, moe_index: int) -> Experts:
        """Returns the set's experts, which add to its gradient."""
        assert self._weights is not None, "begin_step comes first"
        if torch.is_grad_enabled() and self._grads is None:
            self._grads = self._new_gradients()
        weights = without_repeated_bias(self._weights, self._state)
        grads = None if self._grads is None else without_repeated_bias(self._grads, self._state)
        activation = self._pool.activation

        def run(x_RH: Tensor, rows_per_expert: Counts) -> Tensor:
            return grouped_mlp(x_RH, rows_per_expert, weights, activation, grads)

        return run

    @torch.no_grad()
    def finish_step(self) -> None:
        """Sums the gradients of a sharded set over its holders; an unsharded one was added to directly."""
        if not self._pool.is_sharded:
            return
        grads = self._grads or self._new_gradients()
        for name, store in self._pool.stores.items():
            store.add_gradient(getattr(grads, name)[None])
            getattr(grads, name).zero_()

    def costs(self) -> LenderCosts:
        """Weights in the compute dtype, unless an unsharded set is used as it is; gradients of a sharded one. At the step's end a
        gradient is in the order of its holders, twice while it is ordered, next to the slice that is reduced."""
        pool, width, is_used = self._pool, self._dtype.itemsize, self._is_used
        one, copies = pool.bank_numel, pool.is_sharded or width != FP32_BYTES
        exchange = max(2 * store.numel + store.held for store in pool.stores.values()) if pool.is_sharded else 0
        return LenderCosts(
            weights=one * width if is_used and copies else 0,
            gradients=one * FP32_BYTES if is_used and pool.is_sharded else 0,
            exchange=FP32_BYTES * (exchange + (0 if is_used or not pool.is_sharded else one)),
            sent=pool.sent(2 * FP32_BYTES),
            traffic_per_step=one * (FP32_BYTES + width + 2 * FP32_BYTES) if is_used and copies else 0,
        )

    def _new_gradients(self) -> ExpertWeights:
        pool = self._pool
        if not pool.is_sharded and all(hasattr(p, "main_grad") for p in pool.bank.values()):
            return ExpertWeights(**{name: p.main_grad[0] for name, p in pool.bank.items()})
        banks = pool.bank.items()
        return ExpertWeights(**{n: p.new_zeros(pool.stores[n].shape[1:]) for n, p in banks})  # type: ignore[arg-type]
