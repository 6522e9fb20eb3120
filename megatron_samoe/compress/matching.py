"""A common numbering of layers' experts, and of the neurons in them: what is alike gets the same number.

Experts are matched by their outputs: how far each layer's expert is from another's on samples of what either meets. Then the
neurons of matched experts, by what each adds to the output there. Renumbering changes nothing that a model computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_samoe.compress.calibration import LayerCalibration
from megatron_samoe.compress.expert_math import chosen, hidden_of, output_of
from megatron_samoe.ops.grouped_mlp import Activation, ExpertWeights

#: What is matched: experts and their neurons, experts alone, or nothing.
Matching = Literal["neurons", "experts", "none"]


@dataclass(frozen=True)
class Numbering:
    """A layer's new order.

    Attributes:
        experts_E: number, in the layer, of the expert that plays each role.
        neurons_EF: of that expert, the neuron at each place.
    """

    experts_E: Tensor
    neurons_EF: Tensor

    @staticmethod
    def own(num_experts: int, ffn_size: int) -> Numbering:
        """Returns the order that changes nothing."""
        return Numbering(torch.arange(num_experts), torch.arange(ffn_size).repeat(num_experts, 1))

    def applied(self, kind: str, weights_E: Tensor) -> Tensor:
        """Returns a layer's tensor of experts (w1, b1, w2 or b2) in this order."""
        weights_E = weights_E[self.experts_E]
        if kind == "b2":
            return weights_E
        E, F = self.neurons_EF.shape
        between = (1,) * (weights_E.dim() - (3 if kind == "w1" else 2))
        order = self.neurons_EF.view(E, *between, F, *((1,) if kind == "w1" else ()))
        return weights_E.gather(-2 if kind == "w1" else -1, order.expand_as(weights_E))


@dataclass(frozen=True)
class MatchedLayer:
    """A layer to be matched: its experts, and what they met."""

    weights: ExpertWeights
    calibration: LayerCalibration

    @property
    def ffn_size(self) -> int:
        """F."""
        return self.weights.w2.shape[2]


def match(
    layers: Sequence[MatchedLayer], activation: Activation, what: Matching = "neurons", num_groups: int = 1
) -> list[Numbering]:
    """Returns a numbering for each layer: the first keeps its own, each further one follows all before it.

    Args:
        num_groups: consecutive groups of experts, which stay together.
    """
    numberings: list[Numbering] = []
    for layer in layers:
        numbers = Numbering.own(len(layer.weights.w1), layer.ffn_size)
        before = list(zip(layers, numberings, strict=False))
        if before and what != "none":
            cost_EE = torch.stack(
                [output_distances(other, layer, activation)[order.experts_E] for other, order in before]
            )
            experts_E = assigned_in_groups(-cost_EE.sum(0), num_groups)
            neurons_EF = numbers.neurons_EF
            if what == "neurons":
                neurons_EF = torch.stack(
                    [_neurons(before, layer, role, int(e), activation) for role, e in enumerate(experts_E)]
                )
            numbers = Numbering(experts_E, neurons_EF)
        numberings.append(numbers)
    return numberings


def assigned(score_NN: Tensor) -> Tensor:
    """Returns the column of each row so that the sum of scores is the largest; equal scores keep the order."""
    from scipy.optimize import linear_sum_assignment  # which takes a second, once

    own = torch.eye(len(score_NN), dtype=torch.float64) * (1e-9 * float(score_NN.abs().max()) + 1e-300)
    _, columns = linear_sum_assignment((score_NN.double() + own).numpy(), maximize=True)
    return torch.from_numpy(columns)


def assigned_in_groups(score_EE: Tensor, num_groups: int) -> Tensor:
    """Returns what `assigned` does, but that experts of one of the consecutive groups become those of one group."""
    if num_groups == 1:
        return assigned(score_EE)
    size, groups = len(score_EE) // num_groups, range(num_groups)
    score_GeGe = score_EE.view(num_groups, size, num_groups, size)
    within = [[assigned(score_GeGe[g, :, h]) for h in groups] for g in groups]
    score_GG = torch.stack(
        [torch.stack([score_GeGe[g, torch.arange(size), h, within[g][h]].sum() for h in groups]) for g in groups]
    )
    return torch.cat([h * size + within[g][h] for g, h in enumerate(assigned(score_GG).tolist())])


def output_distances(a: MatchedLayer, b: MatchedLayer, activation: Activation) -> Tensor:
    """Returns cost_EE[i, j]: mean squared distance of outputs of a's expert i and b's expert j over samples of both."""
    return _distances(a, b, activation) + _distances(b, a, activation).T


def _distances(own: MatchedLayer, other: MatchedLayer, activation: Activation) -> Tensor:
    """Returns [expert of own, expert of other], over what own's experts met."""
    count = len(own.weights.w1)
    cost_EE = torch.zeros(count, len(other.weights.w1), dtype=torch.float64)
    for expert in range(count):
        x_NH, y_NH = own.calibration.samples(expert)
        if len(x_NH):
            others_ENH = output_of(other.weights, hidden_of(other.weights, x_NH, activation))
            cost_EE[expert] = (others_ENH - y_NH).double().square().sum(2).mean(1)
    return cost_EE


def _neurons(
    before: Sequence[tuple[MatchedLayer, Numbering]],
    layer: MatchedLayer,
    role: int,
    expert: int,
    activation: Activation,
) -> Tensor:
    score_FF = sum(
        neuron_products(
            (other.weights, int(order.experts_E[role])), (layer.weights, expert), order.neurons_EF[role],
            torch.cat((other.calibration.samples(int(order.experts_E[role]))[0], layer.calibration.samples(expert)[0])), activation,
        )
        for other, order in before
    )  # fmt: skip
    assert isinstance(score_FF, Tensor)
    return assigned(score_FF)


def neuron_products(
    a: tuple[ExpertWeights, int], b: tuple[ExpertWeights, int], order_F: Tensor, x_NH: Tensor, activation: Activation
) -> Tensor:
    """Returns score_FF[f, g]: inner product, over rows x, of what a's neuron order[f] and b's neuron g add to the output.

    Lengths stay what they are, so the largest sum of products is the least sum of squared distances.
    """
    (a_hidden, a_out), (b_hidden, b_out) = (
        (hidden_of(one, x_NH, activation)[0].double(), one.w2[0].double())
        for one in (chosen(weights, slice(e, e + 1)) for weights, e in (a, b))
    )
    a_hidden, a_out = a_hidden[:, order_F], a_out[:, order_F]
    return (a_hidden.T @ b_hidden) * (a_out.T @ b_out)
