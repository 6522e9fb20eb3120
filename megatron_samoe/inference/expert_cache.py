"""Experts of a SaMoE served on the fly: the banks stay in memory, and experts that tokens chose are combined into a cache.

Each MoE layer has an equal number of the cache's slots, and gives the one up that it used longest ago. (One order of use
for all layers would be the worst: layers run in turn, so the oldest slot would always be the one that is needed next.)
A step that hits more experts of a layer than it has slots takes them in groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_samoe.inference.decode_layers import Mixed
from megatron_samoe.ops.decode import Routed, combine_rows, experts_block
from megatron_samoe.ops.decode_parts import ExpertStack


class ExpertCache:
    """Slots for the combined experts of some layers.

    Args:
        layers: banks of each MoE layer, by its index in the model.
        num_experts: most experts that the cache holds; at least one for each layer.

    Attributes:
        num_hits, num_misses: experts found in the cache, and combined, since the start.
    """

    def __init__(self, layers: dict[int, Mixed], num_experts: int):
        assert layers and num_experts >= len(layers)
        self._banks, self._per_layer = layers, num_experts // len(layers)
        first, slots = next(iter(layers.values())), self._per_layer * len(layers)
        self._num_experts = first.coefficients_2EP.shape[1]

        def room(t: Tensor) -> Tensor:
            return t.new_empty(slots, *t.shape[1:])

        # On the CPU the index that the op reads is written in place.
        self._index_E = torch.full((self._num_experts,), -1, dtype=torch.int64)
        self._index, index_E = self._index_E.numpy(), self._index_E.to(first.coefficients_2EP.device)
        w1, w2 = (w.map(room) for w in (first.stack.w1, first.stack.w2))
        b1, b2 = (None if b is None else room(b) for b in (first.b1, first.b2))
        self._stack = ExpertStack(w1, w2, b1, b2, first.stack.gated, index_E, index_E)
        #: By layer, expert to slot in order of use, the oldest first; numbers below 0 are slots that are unused.
        starts = range(0, slots, self._per_layer)
        self._held = {
            la: {-1 - slot: slot for slot in range(start, start + self._per_layer)}
            for la, start in zip(layers, starts, strict=True)
        }
        self.num_hits = self.num_misses = 0

    def run(self, layer: int, routed: Routed, y_TKH: Tensor, out_TH: Tensor, scratch: Tensor) -> None:
        """Adds the chosen experts' results to out, as `experts_block` does."""
        held = self._held[layer]
        chosen = set(routed.ids_TK.flatten().tolist()) - {-1}
        waiting = sorted(chosen, key=lambda expert: (expert not in held, expert))
        self.num_hits += sum(expert in held for expert in chosen)
        while waiting:
            group, waiting = waiting[: self._per_layer], waiting[self._per_layer :]
            for expert in group:
                if expert in held:
                    held[expert] = held.pop(expert)  # now the youngest
            for expert in group:
                if expert not in held:
                    self._combine(layer, expert, protected=group)
            self._index[:] = -1
            for expert in group:
                self._index[expert] = held[expert]
            if self._stack.index1_E is not self._index_E:
                self._stack.index1_E.copy_(self._index_E)
            experts_block(routed, self._stack, y_TKH, out_TH, scratch, combine=not waiting)

    def _combine(self, layer: int, expert: int, protected: list[int]) -> None:
        held, banks = self._held[layer], self._banks[layer]
        slot = held.pop(next(old for old in held if old not in protected))
        self.num_misses += 1
        in_banks = range(expert, len(banks.stack.index1_E), self._num_experts)
        for row, (source, target) in enumerate(((banks.stack.w1, self._stack.w1), (banks.stack.w2, self._stack.w2))):
            parts = [source.map(lambda t, i=i: t[i]) for i in in_banks]  # type: ignore[misc]
            combine_rows(parts, banks.coefficients_2EP[row, expert], target.map(lambda t: t[slot]))
        for bias, copies in ((banks.b1, self._stack.b1), (banks.b2, self._stack.b2)):
            if bias is not None and copies is not None:
                copies[slot] = bias[expert]
        held[expert] = slot
