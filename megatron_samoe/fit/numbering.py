"""An order of a layer's experts, and of the neurons in them: renumbering changes nothing that a model computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Numbering:
    """A layer's new order.

    Attributes:
        experts_E: number, in the layer, of the expert that plays each role.
        neurons_EF: of that expert, the neuron at each index.
    """

    experts_E: Tensor
    neurons_EF: Tensor

    @staticmethod
    def of_experts(experts_E: Tensor, ffn_size: int) -> Numbering:
        """Returns an order of experts only, each with its F neurons as they are."""
        return Numbering(experts_E, torch.arange(ffn_size).repeat(len(experts_E), 1))

    @property
    def num_moved(self) -> int:
        """Experts that have another number than before."""
        return int((self.experts_E != torch.arange(len(self.experts_E))).sum())

    def applied(self, kind: str, weights_E: Tensor) -> Tensor:
        """Returns a layer's tensor of experts (w1, b1, w2 or b2) in this order."""
        weights_E = weights_E[self.experts_E]
        E, F = self.neurons_EF.shape
        if kind == "b2" or torch.equal(self.neurons_EF, torch.arange(F).expand(E, F)):
            return weights_E
        between = (1,) * (weights_E.dim() - (3 if kind == "w1" else 2))
        order = self.neurons_EF.view(E, *between, F, *((1,) if kind == "w1" else ()))
        return weights_E.gather(-2 if kind == "w1" else -1, order.expand_as(weights_E))
