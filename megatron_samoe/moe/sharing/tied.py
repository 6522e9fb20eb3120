"""Layers use one of a few sets of experts, by a map (Expert Tying, arXiv:2606.16825); a pool is one set for all layers.

A set's weights do not change within an optimizer step: sharded ones are gathered at its start. Its gradient is the sum
over the layers that use it, over their micro-batches and over ranks, which is taken once, at the step's end.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_samoe.moe.experts import without_repeated_bias
from megatron_samoe.moe.sharing.expert_pool import FP32_BYTES, ExpertPool
from megatron_samoe.moe.sharing.way import LenderCosts, SharingContext
from megatron_samoe.moe.types import Experts
from megatron_samoe.ops.grouped_mlp import Counts, ExpertWeights, grouped_mlp


class TiedSharing:
    """Layers use the sets of their sources; see `way.SharingWay`. A set is a bank of its own, so that sets may differ in
    size, and one that a single pipeline stage uses stays there."""

    def __init__(self, context: SharingContext):
        self._context = context
        self._numbers = sorted({source.number for source in context.sources})

    def layer_part(self, moe_index: int) -> nn.Module:
        """Returns nothing: all experts are shared."""
        return nn.Module()

    def shared_part(self) -> nn.ModuleDict:
        """Returns this rank's sets by number."""
        context, sets = self._context, nn.ModuleDict()
        for number in self._numbers:
            users = [i for i, source in enumerate(context.sources) if source.number == number]
            stages = context.stages_of(users)
            if len(stages) > 1 or context.state.pp.rank in stages:
                sets[str(number)] = ExpertPool(context, context.shapes[users[0]], 1, on_one_stage=len(stages) == 1)
        return sets

    def lender(self, layer_parts: Mapping[int, nn.Module], shared_part: nn.Module | None) -> TiedLender:
        """Returns a lender of the sets."""
        assert isinstance(shared_part, nn.ModuleDict)
        sets = {int(number): pool for number, pool in shared_part.items()}
        sources = self._context.sources
        return TiedLender(sets, {i: sources[i].number for i in layer_parts}, self._context)  # type: ignore[arg-type]


class TiedLender:
    """Lends sets; see `way.ExpertLender`.

    Args:
        sets: by number, all that this rank holds.
        set_of_layer: of this rank's layers.
    """

    def __init__(self, sets: Mapping[int, ExpertPool], set_of_layer: Mapping[int, int], context: SharingContext):
        self._sets, self._set_of_layer = sets, set_of_layer
        self._state, self._dtype = context.state, context.dtype
        self._weights: dict[int, ExpertWeights] = {}
        self._grads: dict[int, ExpertWeights] = {}

    @torch.no_grad()
    def begin_step(self) -> None:
        """Takes in the sets that this rank's layers use; holders of a sharded set gather it together."""
        used = set(self._set_of_layer.values())
        for number, pool in self._sets.items():
            whole = {name: store.whole()[0] for name, store in pool.stores.items()}
            if number in used:
                self._weights[number] = ExpertWeights(**{name: w.to(self._dtype) for name, w in whole.items()})

    def experts(self, moe_index: int) -> Experts:
        """Returns the experts of the layer's set, which add to the set's gradient."""
        number = self._set_of_layer[moe_index]
        assert number in self._weights, "begin_step comes first"
        if torch.is_grad_enabled() and number not in self._grads:
            self._grads[number] = self._new_gradients(self._sets[number])
        weights = without_repeated_bias(self._weights[number], self._state)
        grads = self._grads.get(number)
        if grads is not None:
            grads = without_repeated_bias(grads, self._state)
        activation = self._sets[number].activation

        def run(x_RH: Tensor, rows_per_expert: Counts) -> Tensor:
            return grouped_mlp(x_RH, rows_per_expert, weights, activation, grads)

        return run

    @torch.no_grad()
    def finish_step(self) -> None:
        """Sums the gradients of sharded sets over their holders; whole sets were added to directly."""
        for number, pool in self._sets.items():
            if not pool.is_sharded:
                continue
            grads = self._grads.get(number) or self._new_gradients(pool)
            for name, store in pool.stores.items():
                store.add_gradient(getattr(grads, name)[None])
                getattr(grads, name).zero_()

    def costs(self) -> LenderCosts:
        """Weights in the compute dtype, unless whole sets are used as they are; gradients of sharded sets. At the step's end a
        gradient stands in the order of its holders, twice while it is put in order, beside the slice that is reduced."""
        used, width = set(self._set_of_layer.values()), self._dtype.itemsize
        costs = []
        for number, pool in self._sets.items():
            one, copies = pool.bank_numel, pool.is_sharded or width != FP32_BYTES
            exchange = max(2 * store.numel + store.held for store in pool.stores.values()) if pool.is_sharded else 0
            is_used = number in used
            costs.append(LenderCosts(
                weights=one * width if is_used and copies else 0,
                gradients=one * FP32_BYTES if is_used and pool.is_sharded else 0,
                exchange=FP32_BYTES * (exchange + (0 if is_used or not pool.is_sharded else one)),
                sent=pool.sent(2 * FP32_BYTES),
                traffic_per_step=one * (FP32_BYTES + width + 2 * FP32_BYTES) if is_used and copies else 0,
            ))  # fmt: skip
        return LenderCosts.of_all(costs)

    def _new_gradients(self, pool: ExpertPool) -> ExpertWeights:
        if not pool.is_sharded and all(hasattr(p, "main_grad") for p in pool.bank.values()):
            return ExpertWeights(**{name: p.main_grad[0] for name, p in pool.bank.items()})
        banks = pool.bank.items()
        return ExpertWeights(**{n: p.new_zeros(pool.stores[n].shape[1:]) for n, p in banks})  # type: ignore[arg-type]
