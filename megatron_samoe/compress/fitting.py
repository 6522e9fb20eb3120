"""The fit of a map's banks and sets to a renumbered MoE, and of pairs of layers to choose a map by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from megatron_samoe.compress.calibration import LayerCalibration, OutputSums
from megatron_samoe.compress.compressed_model import FittedGroup
from megatron_samoe.compress.expert_math import matrices
from megatron_samoe.compress.matching import MatchedLayer, Matching, Numbering, match
from megatron_samoe.compress.weighted_fit import FitTarget, WeightedFit, fit_target, pooled_gram, starts_of
from megatron_samoe.config.sharing_map import Source, Way
from megatron_samoe.interop.bank_fit import match_experts, match_to_mean
from megatron_samoe.interop.gram import inner_products
from megatron_samoe.ops.grouped_mlp import Activation, ExpertWeights


def in_order(layer: MatchedLayer, numbers: Numbering) -> MatchedLayer:
    """Returns a layer's experts, and the moments of what they meet, in another order; samples and loads follow."""
    weights = ExpertWeights(**{kind: numbers.applied(kind, t) for kind, t in layer.weights.items()})
    old = layer.calibration
    hidden_ECC = old.hidden_ECC[numbers.experts_E]
    order_EC = numbers.neurons_EF
    if hidden_ECC.shape[1] > order_EC.shape[1]:  # the bias's 1 stays last
        order_EC = torch.cat((order_EC, torch.full((len(order_EC), 1), order_EC.shape[1])), 1)
    hidden_ECC = hidden_ECC.gather(1, order_EC[:, :, None].expand_as(hidden_ECC))
    hidden_ECC = hidden_ECC.gather(2, order_EC[:, None, :].expand_as(hidden_ECC))
    order_E = numbers.experts_E
    new = LayerCalibration(
        old.tokens_E[order_E], old.input_EDD[order_E], hidden_ECC, old.saliency_E[order_E], old.key_ER[order_E],
        old.sample_in_ERH[order_E], old.sample_out_ERH[order_E],
    )  # fmt: skip
    return MatchedLayer(weights, new)


def fit_inputs(layers: Sequence[MatchedLayer], way: Way, num_banks: int) -> WeightedFit:
    """Returns the fit of w1 and b1 for layers in a common numbering."""
    w1_LEUD = torch.stack([matrices(layer.weights)[0] for layer in layers])
    moment_LEDD = torch.stack([layer.calibration.input_EDD for layer in layers])
    return _fit(FitTarget.of_weights(w1_LEUD, moment_LEDD), w1_LEUD, moment_LEDD, way, num_banks)


def fit_outputs(
    layers: Sequence[MatchedLayer], way: Way, num_banks: int, sums: Sequence[OutputSums] | None = None
) -> WeightedFit:
    """Returns the fit of w2 and b2: to the weights, or, with sums, to the outputs from what the fitted w1 gives."""
    w2_LEHC = torch.stack([matrices(layer.weights)[1] for layer in layers])
    if sums is None:
        moment_LECC = torch.stack([layer.calibration.hidden_ECC for layer in layers])
        return _fit(FitTarget.of_weights(w2_LEHC, moment_LECC), w2_LEHC, moment_LECC, way, num_banks)
    moment_LECC = torch.stack([s.hidden_ECC for s in sums])
    cross_LEHC = torch.stack([s.cross_EHC for s in sums])
    target = FitTarget.of_outputs(w2_LEHC, cross_LEHC, moment_LECC, torch.stack([s.power_E for s in sums]))
    return _fit(target, w2_LEHC, moment_LECC, way, num_banks)


def _fit(target: FitTarget, w_LEUD: Tensor, moment_LEDD: Tensor, way: Way, num_banks: int) -> WeightedFit:
    if not way.mixes:
        return fit_target(target, [torch.ones(len(w_LEUD), 1, 1)], is_fixed=True)
    return fit_target(target, starts_of(w_LEUD, moment_LEDD, num_banks))


def best_numbering(
    layers: Sequence[MatchedLayer],
    activation: Activation,
    what: Matching,
    way: Way,
    num_banks: int,
    num_groups: int = 1,
) -> list[Numbering]:
    """Returns the numbering, of several, with which the layers would lose least if all met the mean of what they meet: their
    own, that of `match`, and the experts' by their weights alone, which finds a pool that was folded.

    Args:
        num_groups: consecutive groups of experts, which stay together.
    """
    E, F = len(layers[0].weights.w1), layers[0].ffn_size
    own = [Numbering.own(E, F) for _ in layers]
    if what == "none":
        return own
    grams = [
        inner_products(lambda n, row=row: matrices(layers[n].weights)[row].flatten(1), len(layers), E)  # type: ignore[misc]
        for row in (0, 1)
    ]
    by_banks = way.combines and num_groups == 1
    order_LE = match_experts(grams, num_banks) if by_banks else match_to_mean(grams, num_groups)
    by_weights = [Numbering(order_E, numbers.neurons_EF) for order_E, numbers in zip(order_LE, own, strict=True)]

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


def with_inputs(layer: MatchedLayer, fit: WeightedFit, number: int) -> ExpertWeights:
    """Returns a layer's experts with w1 and b1 as the banks give them; `number` is the layer's in the fit."""
    w1_EUD = torch.einsum("p,peud->eud", fit.coefficients_LGP[number, 0], fit.bank_PEUD).float()
    old = layer.weights
    width = old.w1.shape[-1]
    b1 = None if old.b1 is None else w1_EUD[..., -1].reshape(old.b1.shape)
    return replace(old, w1=w1_EUD[..., :width].reshape(old.w1.shape), b1=b1)


def pair_errors(
    layers: Sequence[MatchedLayer], activation: Activation, way: Way, what: Matching, num_groups: int = 1
) -> Tensor:
    """Returns error_LL: what a pair of layers loses by sharing a set, as the mean share of w1's and of w2's power."""
    error_LL = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    for a, b in combinations(range(len(layers)), 2):
        pair = [layers[a], layers[b]]
        matched = [
            in_order(layer, n)
            for layer, n in zip(pair, best_numbering(pair, activation, what, way, 1, num_groups), strict=True)
        ]
        shares = [f.relative**2 for f in (fit_inputs(matched, way, 1), fit_outputs(matched, way, 1))]
        error_LL[a, b] = error_LL[b, a] = sum(shares) / 2
    return error_LL


def fitted_group(
    source: Source, indices: Sequence[int], layers: Sequence[MatchedLayer], inputs: WeightedFit, num_banks: int,
    sums: Sequence[OutputSums] | None,
) -> FittedGroup:  # fmt: skip
    """Returns a source's fits; `layers` and `sums` are those of the layers that share it, in a common numbering."""
    return FittedGroup(source, indices, (inputs, fit_outputs(layers, source.way, num_banks, sums)))


def fit_bytes(num_layers: int, num_experts: int, rows: int, columns: int, num_banks: int) -> int:
    """Returns about how many bytes the fit of one matrix takes: moments, products and banks in fp64, and one role's equations."""
    per_role = num_layers * (2 * columns * columns + 3 * rows * columns) + num_banks * rows * columns
    return 8 * (num_experts * per_role + 3 * (num_banks * columns) ** 2)
