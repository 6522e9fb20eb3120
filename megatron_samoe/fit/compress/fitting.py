"""The fits of both matrices of layers that share, weighted by their experts' inputs, and of pairs to choose a map by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from megatron_samoe.config.sharing_map import Way
from megatron_samoe.fit.bank_fit import BankFit, FitTarget, fit_target, starts_of
from megatron_samoe.fit.calibration import OutputSums
from megatron_samoe.fit.expert_math import matrices
from megatron_samoe.fit.matching import MatchedLayer, Matching, best_numbering, in_order
from megatron_samoe.ops.grouped_mlp import Activation, ExpertWeights


def fit_inputs(layers: Sequence[MatchedLayer], way: Way, num_banks: int) -> BankFit:
    """Returns the fit of w1 and b1 for layers in a common numbering."""
    w1_LEUD = torch.stack([matrices(layer.weights)[0] for layer in layers])
    moment_LEDD = torch.stack([layer.calibration.input_EDD for layer in layers])
    return _fit(FitTarget.of_weights(w1_LEUD, moment_LEDD), w1_LEUD, moment_LEDD, way, num_banks)


def fit_outputs(
    layers: Sequence[MatchedLayer], way: Way, num_banks: int, sums: Sequence[OutputSums] | None = None
) -> BankFit:
    """Returns the fit of w2 and b2: to the weights, or, with sums, to the outputs from what the fitted w1 gives."""
    w2_LEHC = torch.stack([matrices(layer.weights)[1] for layer in layers])
    if sums is None:
        moment_LECC = torch.stack([layer.calibration.hidden_ECC for layer in layers])
        return _fit(FitTarget.of_weights(w2_LEHC, moment_LECC), w2_LEHC, moment_LECC, way, num_banks)
    moment_LECC = torch.stack([s.hidden_ECC for s in sums])
    cross_LEHC = torch.stack([s.cross_EHC for s in sums])
    target = FitTarget.of_outputs(w2_LEHC, cross_LEHC, moment_LECC, torch.stack([s.power_E for s in sums]))
    return _fit(target, w2_LEHC, moment_LECC, way, num_banks)


def _fit(target: FitTarget, w_LEUD: Tensor, moment_LEDD: Tensor, way: Way, num_banks: int) -> BankFit:
    if not way.mixes:
        return fit_target(target, [torch.ones(len(w_LEUD), 1, 1)], is_fixed=True)
    return fit_target(target, starts_of(w_LEUD, moment_LEDD, num_banks))


def with_inputs(layer: MatchedLayer, fit: BankFit, number: int) -> ExpertWeights:
    """Returns a layer's experts with w1 and b1 as the banks give them; `number` is the layer's in the fit."""
    w1_EUD = torch.einsum("p,peud->eud", fit.coefficients_LGP[number, 0], fit.banks).float()
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


def fit_bytes(num_layers: int, num_experts: int, rows: int, columns: int, num_banks: int) -> int:
    """Returns about how many bytes the fit of one matrix takes: moments, products and banks in fp64, and one role's equations."""
    per_role = num_layers * (2 * columns * columns + 3 * rows * columns) + num_banks * rows * columns
    return 8 * (num_experts * per_role + 3 * (num_banks * columns) ** 2)
