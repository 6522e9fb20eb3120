"""Per-layer views of the experts: load, gradient norm of each, combination coefficients (--moe-per-layer-logging)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_samoe.moe.combination import normalize_coefficients
from megatron_samoe.moe.expert_pool import StepCombination
from megatron_samoe.moe.experts import main_grads_of
from megatron_samoe.ops.grouped_mlp import ExpertWeights
from megatron_samoe.training.setup import TrainSetup
from megatron_samoe.training.train_step import RoutingStats


@dataclass(frozen=True)
class MoEDiagnostics:
    """One step's views, as nested lists.

    Attributes:
        expert_load: [L][E] share of a layer's routed tokens.
        expert_grad_norm: [L][E] norm of the gradient of each layer's (effective) expert, before clipping; None with
            --samoe-combine layer, which never holds a layer's gradient of the whole batch.
        combination: [L][2][G][P] weights of banks for input and output projections; None without a pool.
    """

    expert_load: list
    expert_grad_norm: list | None
    combination: list | None

    def plain(self) -> dict[str, Any]:
        """Returns what exists, by key of the record."""
        values = {
            "expert_load": self.expert_load,
            "expert_grad_norm": self.expert_grad_norm,
            "combination": self.combination,
        }
        return {key: value for key, value in values.items() if value is not None}


def expert_grad_norms(setup: TrainSetup, gradient_scale: float) -> Tensor | None:
    """Returns [L, E], to be called after the last backward pass of a step and before gradients are reduced."""
    layers = _layer_gradients(setup)
    if layers is None:
        return None
    squares_Le = torch.stack([_squared_norms(grads, setup) for grads in layers])
    setup.parallel.etp.all_reduce(squares_Le)
    squares_eL = setup.parallel.ep.all_gather(squares_Le.t().contiguous())
    return squares_eL.t().sqrt() / gradient_scale


def _layer_gradients(setup: TrainSetup) -> Sequence[ExpertWeights] | None:
    combination = setup.model.combination
    if combination is None:
        own = [main_grads_of(dict(layer.moe.experts.named_parameters())) for layer in setup.model.layers() if layer.is_moe]
        return [grads for grads in own if grads is not None]
    grads = combination.layer_gradients() if isinstance(combination, StepCombination) else None
    if grads is None:
        return None
    return [grads.map(lambda t, i=i: t[i]) for i in range(setup.model.num_moe_layers)]


def _squared_norms(grads: ExpertWeights, setup: TrainSetup) -> Tensor:
    edp = setup.parallel.edp
    total = torch.zeros(grads.w1.shape[0], dtype=torch.float64, device=grads.w1.device)
    for name, grad in grads.items():
        summed = edp.all_reduce(grad.clone()) if edp.size > 1 else grad
        if name == "b2" and setup.parallel.etp.rank != 0:
            continue  # the output bias is added, and its gradient held, by one expert-tensor rank
        total += summed.flatten(1).norm(dim=1).double().square()
    return total


def make_diagnostics(setup: TrainSetup, routing: RoutingStats, grad_norms_LE: Tensor | None) -> MoEDiagnostics:
    """Returns one step's views; all ranks call it together."""
    combination = None
    moe = setup.config.moe
    if moe.has_pool:
        weights = []
        for layer in setup.model.layers():
            if layer.is_moe:
                a_2GP = normalize_coefficients(layer.moe.combination.detach(), moe.samoe_normalization)
                if moe.samoe_granularity == "expert":
                    a_2GP = setup.parallel.ep.all_gather(a_2GP.transpose(0, 1).contiguous()).transpose(0, 1)
                weights.append(a_2GP.tolist())
        combination = weights
    norms = None if grad_norms_LE is None else grad_norms_LE.tolist()
    return MoEDiagnostics(routing.fractions_LE().tolist(), norms, combination)
