"""Experts of a SaMoE served on the fly: the banks stay in memory, and experts that tokens chose are combined into a cache.

Each MoE layer has an equal number of the cache's slots, and gives the one up that it used longest ago. (One order of use
for all layers would be the worst: layers run in turn, so the oldest slot would always be the one that is needed next.)
A step that hits more experts of a layer than it has slots takes them in groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_samoe.inference.decode_layers import Banks
from megatron_samoe.ops.decode import ExpertStack, Routed, combine_rows, experts_block


class ExpertCache:
    """Slots for the combined experts of some layers.

    Args:
        layers: banks of each MoE layer, by its place in the model.
        num_experts: most experts that the cache holds; at least one for each layer.

    Attributes:
        num_hits, num_misses: experts found in the cache, and combined, since the start.
    """

    def __init__(self, layers: dict[int, Banks], num_experts: int):
        assert layers and num_experts >= len(layers)
        first = next(iter(layers.values()))
        self._per_layer = num_experts // len(layers)
        slots = self._per_layer * len(layers)

        def room(t: Tensor) -> Tensor:
            return t.new_empty(slots, *t.shape[1:])

        self._w1, self._w2 = (w[0].map(room) for w in (first.w1, first.w2))
        self._b1, self._b2 = (None if b is None else room(b) for b in (first.b1, first.b2))
        self._banks = layers
        self._gated = first.gated
        device = first.coefficients_2EP.device
        self._num_experts = first.coefficients_2EP.shape[1]
        # On the CPU the index that the op reads is written in place.
        self._index_E = torch.full((self._num_experts,), -1, dtype=torch.int64)
        self._index_on_device_E = self._index_E if device.type == "cpu" else self._index_E.to(device)
        self._index = self._index_E.numpy()
        #: By layer, expert to slot in order of use, the oldest first.
        self._held: dict[int, dict[int, int]] = {layer: {} for layer in layers}
        self._free = {
            layer: list(range(i * self._per_layer, (i + 1) * self._per_layer)) for i, layer in enumerate(layers)
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
            if self._index_on_device_E is not self._index_E:
                self._index_on_device_E.copy_(self._index_E)
            index_E = self._index_on_device_E
            stack = ExpertStack(self._w1, self._w2, self._b1, self._b2, self._gated, index_E, index_E)
            experts_block(routed, stack, y_TKH, out_TH, scratch, combine=not waiting)

    def _combine(self, layer: int, expert: int, protected: list[int]) -> None:
        held, banks = self._held[layer], self._banks[layer]
        if self._free[layer]:
            slot = self._free[layer].pop()
        else:
            slot = held.pop(next(old for old in held if old not in protected))
        self.num_misses += 1
        for row, (sources, target) in enumerate(((banks.w1, self._w1), (banks.w2, self._w2))):
            parts = [w.map(lambda t: t[expert]) for w in sources]
            combine_rows(parts, banks.coefficients_2EP[row, expert], target.map(lambda t: t[slot]))
        for bias, copies in ((banks.b1, self._b1), (banks.b2, self._b2)):
            if bias is not None and copies is not None:
                copies[slot] = bias[expert]
        held[expert] = slot
