"""Per-layer views of the experts: load, gradient norm of each, coefficients (--moe-per-layer-logging)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_samoe.errors import ConfigError
from megatron_samoe.ops.grouped_mlp import ExpertWeights
from megatron_samoe.training.hook import Hook, Record, Training
from megatron_samoe.training.setup import TrainSetup
from megatron_samoe.training.train_step import StepResult, fractions


class LayerDiagnostics(Hook):
    """Adds these views to every record (--moe-per-layer-logging), as nested lists: `expert_load` [L][E], the share of a layer's
    routed tokens; `expert_grad_norm` [L][E], the norm of the gradient of each layer's (effective) expert before clipping, not with
    --samoe-combine layer, which never holds a layer's gradient of the full batch; and `combination` [L][2][G][P], weights of banks
    for input and output projections, where there are any.
    """

    def __init__(self) -> None:
        self._norms_LE: Tensor | None = None

    def wants_gradients(self, run: Training) -> bool:
        """Whether the step will be recorded anyway."""
        return self._is_recorded(run, run.state.iteration + 1)

    def _is_recorded(self, run: Training, iteration: int) -> bool:
        config = run.setup.config
        return iteration == config.training.train_iters or iteration % config.logging.log_interval == 0

    def backward_done(self, run: Training) -> None:
        """Takes the norms of this rank's gradients, before they are reduced."""
        if self.wants_gradients(run):
            self._norms_LE = expert_grad_norms(run.setup, run.state.loss_scale.value)

    def contribute(self, run: Training, result: StepResult, record: Record) -> None:
        if not self._is_recorded(run, run.state.iteration):
            return
        assert result.routing is not None
        record["expert_load"] = fractions(result.routing.counts_LE).tolist()
        if self._norms_LE is not None:
            record["expert_grad_norm"] = self._norms_LE.tolist()
        if run.setup.config.moe.has_coefficients:
            record["combination"] = gathered_coefficients(run.setup).tolist()


def expert_grad_norms(setup: TrainSetup, gradient_scale: float) -> Tensor | None:
    """Returns [L, E], to be called after the last backward pass of a step and before gradients are reduced."""
    layers = setup.model.lender.layer_gradients()
    if layers is None:
        return None
    parallel, shape = setup.parallel, (setup.model.num_moe_layers, setup.config.moe.most_experts)
    squares_LE = torch.zeros(shape, dtype=torch.float64, device=parallel.device)
    for moe_index, grads in layers.items():
        squares_e = _squared_norms(grads, setup)
        first = parallel.ep.rank * len(squares_e)  # layers may differ in their number of experts
        squares_LE[moe_index, first : first + len(squares_e)] = squares_e
    for group in (parallel.etp, parallel.ep, parallel.pp):
        group.all_reduce(squares_LE)
    return squares_LE.sqrt() / gradient_scale


def _squared_norms(grads: ExpertWeights, setup: TrainSetup) -> Tensor:
    edp = setup.parallel.edp
    total = torch.zeros(grads.w1.shape[0], dtype=torch.float64, device=grads.w1.device)
    for name, grad in grads.items():
        summed = edp.all_reduce(grad.clone()) if edp.size > 1 else grad
        if name == "b2" and setup.parallel.etp.rank != 0:
            continue  # the output bias is added, and its gradient held, by one expert-tensor rank
        total += summed.flatten(1).norm(dim=1).double().square()
    return total


def gathered_coefficients(setup: TrainSetup) -> Tensor:
    """Returns the normalised coefficients of all layers, [L, 2, G, P], zeros for layers without; all ranks call it together."""
    moe = setup.config.moe
    groups = moe.most_experts if moe.samoe_granularity == "expert" else 1
    shape = (setup.model.num_moe_layers, 2, groups, moe.num_expert_banks if moe.has_pool else 1)
    a_L2GP = torch.zeros(shape, dtype=torch.float64, device=setup.parallel.device)
    for layer in setup.model.moe_layers():
        try:
            mixture = setup.model.mixture(layer.moe)
        except ConfigError:
            continue  # its experts are more than a mixture, and coefficients do not say what they are
        a_2GP = mixture.a_2GP
        if a_2GP is None:
            continue
        if moe.samoe_granularity == "expert" and mixture.combines:
            a_2GP = setup.parallel.ep.all_gather(a_2GP.transpose(0, 1).contiguous()).transpose(0, 1)
        a_L2GP[layer.moe.moe_index, :, :, : a_2GP.shape[2]] = a_2GP
    return setup.parallel.pp.all_reduce(a_L2GP)
