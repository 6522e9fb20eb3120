"""A common numbering of layers' experts, and of the neurons in them: similar ones get the same number.

Experts are matched by their outputs: how far each layer's expert is from another's on samples of what either meets. Then the
neurons of matched experts, by what each adds to the output there. The best of this numbering, the layers' own and that of
`matching_by_weights` is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_samoe.config.sharing_map import Way
from megatron_samoe.fit.assignment import assigned, assigned_in_groups
from megatron_samoe.fit.bank_fit import pooled_gram
from megatron_samoe.fit.calibration import LayerCalibration
from megatron_samoe.fit.expert_math import chosen, hidden_of, matrices, output_of
from megatron_samoe.fit.gram import inner_products
from megatron_samoe.fit.matching_by_weights import match_by_weights
from megatron_samoe.fit.numbering import Numbering
from megatron_samoe.ops.grouped_mlp import Activation, ExpertWeights

#: The parts that are matched: experts and their neurons, experts only, or nothing.
Matching = Literal["neurons", "experts", "none"]


@dataclass(frozen=True)
class MatchedLayer:
    """A layer to be matched: its experts, and their statistics."""

    weights: ExpertWeights
    calibration: LayerCalibration

    @property
    def ffn_size(self) -> int:
        """F."""
        return self.weights.w2.shape[2]


def in_order(layer: MatchedLayer, numbers: Numbering) -> MatchedLayer:
    """Returns a layer's experts, and the moments of their inputs, in another order; samples and loads follow."""
    weights = ExpertWeights(**{kind: numbers.applied(kind, t) for kind, t in layer.weights.items()})
    old = layer.calibration
    hidden_ECC = old.hidden_ECC[numbers.experts_E]
    order_EC = numbers.neurons_EF
    if hidden_ECC.shape[1] > order_EC.shape[1]:  # the bias's 1 stays last
        order_EC = torch.cat((order_EC, torch.full((len(order_EC), 1), order_EC.shape[1])), 1)
    hidden_ECC = hidden_ECC.gather(1, order_EC[:, :, None].expand_as(hidden_ECC))
    hidden_ECC = hidden_ECC.gather(2, order_EC[:, None, :].expand_as(hidden_ECC))
    new = LayerCalibration(**{name: sums_E[numbers.experts_E] for name, sums_E in vars(old).items()})
    new.hidden_ECC = hidden_ECC
    return MatchedLayer(weights, new)


def best_numbering(
    layers: Sequence[MatchedLayer],
    activation: Activation,
    what: Matching,
    way: Way,
    num_banks: int,
    num_groups: int = 1,
) -> list[Numbering]:
    """Returns the numbering, of several, with which the layers would lose least if all had the mean of their inputs: their
    own, that of `match`, and the experts' by their weights only, which finds a pool that was folded.

    Args:
        num_groups: consecutive groups of experts, which stay together.
    """
    E, F = len(layers[0].weights.w1), layers[0].ffn_size
    own = [Numbering.of_experts(torch.arange(E), F)] * len(layers)
    if what == "none":
        return own
    grams = [
        inner_products(lambda n, row=row: matrices(layers[n].weights)[row].flatten(1), len(layers), E)  # type: ignore[misc]
        for row in (0, 1)
    ]
    order_LE = match_by_weights(grams, way, num_banks, num_groups)
    by_weights = [Numbering.of_experts(order_E, F) for order_E in order_LE]

    def loss(numberings: list[Numbering]) -> float:
        ordered = [in_order(layer, numbers) for layer, numbers in zip(layers, numberings, strict=True)]
        moments = [
            torch.stack([layer.calibration.input_EDD for layer in ordered]),
            torch.stack([layer.calibration.hidden_ECC for layer in ordered]),
        ]
        weights = [torch.stack(parts) for parts in zip(*(matrices(layer.weights) for layer in ordered), strict=True)]
        return sum(
            _lost_share(pooled_gram(w_LEUD, moment_LEDD), way, num_banks)
            for w_LEUD, moment_LEDD in zip(weights, moments, strict=True)
        )

    return min((own, match(layers, activation, what, num_groups), by_weights), key=loss)


def _lost_share(gram_LL: Tensor, way: Way, num_banks: int) -> float:
    """Returns the share of the layers' squared norms that banks, or their mean as a tied set, leave."""
    whole = gram_LL.diagonal().sum().clamp_min(1e-300)
    kept = torch.linalg.eigvalsh(gram_LL)[-num_banks:].sum() if way.mixes else gram_LL.mean()
    return float(1 - kept / whole)


def match(
    layers: Sequence[MatchedLayer], activation: Activation, what: Matching = "neurons", num_groups: int = 1
) -> list[Numbering]:
    """Returns a numbering for each layer: the first keeps its own, each further one follows all before it.

    Args:
        num_groups: consecutive groups of experts, which stay together.
    """
    numberings: list[Numbering] = []
    for layer in layers:
        numbers = Numbering.of_experts(torch.arange(len(layer.weights.w1)), layer.ffn_size)
        before = list(zip(layers, numberings, strict=False))
        if before and what != "none":
            costs = [
                _distances(other, layer, activation) + _distances(layer, other, activation).T for other, _ in before
            ]
            ordered = [cost_EE[order.experts_E] for cost_EE, (_, order) in zip(costs, before, strict=True)]
            experts_E = assigned_in_groups(-torch.stack(ordered).sum(0), num_groups)
            numbers = Numbering.of_experts(experts_E, layer.ffn_size)
            if what == "neurons":
                found = [_neurons(before, layer, r, int(e), activation) for r, e in enumerate(numbers.experts_E)]
                numbers = replace(numbers, neurons_EF=torch.stack(found))
        numberings.append(numbers)
    return numberings


def _distances(own: MatchedLayer, other: MatchedLayer, activation: Activation) -> Tensor:
    """Returns the mean squared distance of outputs, [expert of own, expert of other], over samples of own's experts."""
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
            (other.weights, int(order.experts_E[role])),
            (layer.weights, expert),
            order.neurons_EF[role],
            torch.cat((other.calibration.samples(int(order.experts_E[role]))[0], layer.calibration.samples(expert)[0])),
            activation,
        )
        for other, order in before
    )
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
