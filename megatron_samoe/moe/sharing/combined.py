"""All MoE layers combine one pool of expert banks (SaMoE, Zhang et al. 2022).

    W[l, e] = sum_b A[l, b] T[b, e]                  dT = A^T dW,   dA = dW T^T

with banks T, layer coefficients A and effective weights W. A and T do not change within an optimizer step, so
`StepLender` makes all W once at its start and contracts the summed dW once at its end; `LayerLender` makes one layer's W
when it runs and again in its backward, and contracts dW at once. Both give autograd's gradients up to the order of sums.

Banks and coefficients are fp32 whatever the compute dtype: they are their own master weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from megatron_samoe.moe.experts import without_repeated_bias
from megatron_samoe.moe.sharing.bank_exchange import BankExchange, exchange_saves
from megatron_samoe.moe.sharing.coefficients import ROW_OF_WEIGHT, Coefficients, bank_std_factor
from megatron_samoe.moe.sharing.expert_pool import FP32_BYTES, ExpertPool
from megatron_samoe.moe.sharing.selected import SelectedLender
from megatron_samoe.moe.sharing.way import ExpertLender, LenderCosts, Mixture, SharingContext
from megatron_samoe.moe.types import Experts
from megatron_samoe.ops.combine import combine_banks, combine_banks_backward
from megatron_samoe.ops.grouped_mlp import (
    Activation,
    Counts,
    ExpertWeights,
    expert_rows,
    grouped_mlp,
    grouped_mlp_backward,
    grouped_mlp_forward,
    with_backward,
)
from megatron_samoe.parallel_state.state import ParallelState


class CombinedSharing:
    """See `way.SharingWay`."""

    def __init__(self, context: SharingContext):
        self._context = context

    def layer_part(self, moe_index: int) -> Coefficients:
        """Returns a layer's coefficients."""
        context, shapes = self._context, self._context.shapes
        experts = shapes[moe_index].num_experts
        return Coefficients(context.config, moe_index, len(shapes), experts, context.state, context.dtype)

    def shared_part(self) -> ExpertPool:
        """Returns the pool."""
        context, factor = self._context, bank_std_factor(self._context.config)
        shape = context.shapes[0]
        shape = replace(shape, init_std=shape.init_std * factor, output_init_std=shape.output_init_std * factor)
        return ExpertPool(context, shape, context.config.num_expert_banks)

    def lender(self, layer_parts: Mapping[int, nn.Module], shared_part: nn.Module | None) -> ExpertLender:
        """Returns the lender that --samoe-combine asks for, or the way of serving."""
        context, config, pool = self._context, self._context.config, shared_part
        assert isinstance(pool, ExpertPool)
        parts = {i: part for i, part in layer_parts.items() if isinstance(part, Coefficients)}
        common = (pool, parts, context.state, context.dtype)
        if context.serving == "selected":
            return SelectedLender(*common)
        if context.serving == "on-the-fly" or (context.serving is None and config.samoe_combine == "layer"):
            return LayerLender(*common)
        exchange = None
        if pool.is_sharded and exchange_saves(config.num_expert_banks, context.layers_of_stage):
            exchange = BankExchange(context.state, context.layers_of_stage)
        return StepLender(*common, exchange)

    def mixture(self, moe_index: int, layer_part: nn.Module, shared_part: nn.Module | None) -> Mixture:
        """Returns the banks and the layer's coefficients."""
        assert isinstance(layer_part, Coefficients) and isinstance(shared_part, ExpertPool)
        combines = self._context.sources[moe_index].way.combines
        return Mixture(shared_part, layer_part.normalized().detach(), combines)


class StepLender(ExpertLender):
    """Effective weights of all layers, made once per step; their gradients, contracted once per step.

    Args:
        exchange: how holders of sharded banks combine for each other; None to gather the banks instead.
    """

    def __init__(
        self,
        pool: ExpertPool,
        coefficients: Mapping[int, Coefficients],
        state: ParallelState,
        dtype: torch.dtype,
        exchange: BankExchange | None = None,
    ):
        self._pool, self._coefficients = pool, dict(coefficients)
        self._exchange = exchange
        self._row_of_layer = {moe_index: row for row, moe_index in enumerate(self._coefficients)}
        self._state, self._dtype = state, dtype
        self._weights: ExpertWeights | None = None
        self._grads: ExpertWeights | None = None

    def begin_step(self) -> None:
        """Combines all layers' weights, one pass over the banks."""
        if self._weights is None:
            self._weights = self._per_layer(torch.empty, self._dtype)
        a_2LGP = self._normalized().detach()
        if self._exchange is not None:
            a_2LGP = self._exchange.all_coefficients(a_2LGP)
        for name, weight in self._weights.items():
            store, a_LGP = self._pool.stores[name], a_2LGP[ROW_OF_WEIGHT[name]]
            if self._exchange is not None:
                self._exchange.combine(store, a_LGP, weight)
                continue
            bank = store.unsharded()
            if self._coefficients:
                combine(a_LGP, bank, weight)

    def experts(self, moe_index: int) -> Experts:
        """Returns a layer's experts, plain weights with a gradient buffer of their own."""
        assert self._weights is not None, "begin_step comes first"
        row = self._row_of_layer[moe_index]
        if torch.is_grad_enabled() and self._grads is None:
            self._grads = self._per_layer(torch.zeros, torch.promote_types(self._dtype, torch.float32))
        weights = without_repeated_bias(self._weights.map(lambda t: t[row]), self._state)
        grads = None
        if self._grads is not None:
            grads = without_repeated_bias(self._grads.map(lambda t: t[row]), self._state)
        activation = self._pool.activation

        def run(x_RH: Tensor, rows_per_expert: Counts) -> Tensor:
            return grouped_mlp(x_RH, rows_per_expert, weights, activation, grads)

        return run

    def finish_step(self) -> None:
        """Contracts the layers' summed weight gradients and clears them."""
        if self._grads is None:
            self._grads = self._per_layer(torch.zeros, torch.promote_types(self._dtype, torch.float32))
        with torch.enable_grad():
            a_2LGP = self._normalized()
        da_2LGP = self._contract(a_2LGP.detach(), self._grads)
        for _, grad in self._grads.items():
            grad.zero_()
        raw = [part.coefficients for part in self._coefficients.values()]
        trained = [c for c in raw if c.requires_grad]
        if trained:
            for c, dc in zip(trained, torch.autograd.grad(a_2LGP, trained, da_2LGP), strict=True):
                c.main_grad += dc  # type: ignore[attr-defined]

    def _contract(self, a_2lGP: Tensor, grads: ExpertWeights) -> Tensor:
        """Adds the banks' gradients and returns this rank's part of the coefficients' gradient."""
        da_2lGP = torch.zeros_like(a_2lGP)
        exchange = self._exchange
        a_2LGP = a_2lGP if exchange is None else exchange.all_coefficients(a_2lGP)
        for name, grad in grads.items():
            store, row = self._pool.stores[name], ROW_OF_WEIGHT[name]
            if exchange is not None:
                da_LGP = exchange.contract(store, a_2LGP[row], grad)
                if exchange.is_first_of_stage(store):
                    da_2lGP[row] += da_LGP[list(exchange.own_layers)]
                continue
            with store.gradient() as bank_grad:
                bank = store.unsharded()
                if self._coefficients:
                    da_2lGP[row] += contract(a_2LGP[row], bank, grad, bank_grad)
        return da_2lGP

    def costs(self) -> LenderCosts:
        """Effective weights and their fp32 gradients of this rank's layers.

        One bank tensor after the other is exchanged. Where banks are gathered, at the step's end are in memory together the
        bank, its gradient, that in the order of its holders (twice while it is put in order) and the slice that is reduced of
        it. Where holders combine, a rank's weight gradients are in the order of their receivers, next to those received and
        their sum. Combining reads banks and writes weights, contracting reads and clears gradients and updates the banks'.
        """
        pool, layers, width = self._pool, len(self._coefficients), self._dtype.itemsize
        num_banks, one, stores = pool.coefficient_shape[1], pool.bank_numel, pool.stores.values()
        exchange, sent = 0, pool.sent(3 * FP32_BYTES)
        if self._exchange is not None:
            everywhere, pp = sum(map(len, self._exchange.layers_of_stage)), self._state.pp.size
            exchange = max(
                layers * s.num_elements + (s.group.size // pp + 1) * everywhere * (s.held // num_banks) for s in stores
            )
            moved = layers * (width + FP32_BYTES)  # combined weights come, their gradients go
            sent = {group: elements * moved / num_banks for group, elements in pool.sent(1).items()}
        elif pool.is_sharded:
            exchange = max(4 * store.numel + store.held for store in stores)
        return LenderCosts(
            weights=layers * one * width,
            gradients=layers * one * FP32_BYTES,
            exchange=FP32_BYTES * exchange,
            sent=sent,
            traffic_per_step=one * (4 * num_banks * FP32_BYTES + layers * (width + 2 * FP32_BYTES)),
        )

    def layer_gradients(self) -> dict[int, ExpertWeights]:
        """Returns this rank's gradients of the effective weights so far; none before the first backward."""
        if self._grads is None:
            return {}
        return {moe_index: self._grads.map(itemgetter(row)) for moe_index, row in self._row_of_layer.items()}

    def _per_layer(self, make: Callable[..., Tensor], dtype: torch.dtype) -> ExpertWeights:
        layers, device = len(self._coefficients), self._state.device
        shapes = self._pool.shapes()
        return ExpertWeights(
            **{n: make((layers, *shape[1:]), dtype=dtype, device=device) for n, shape in shapes.items()}
        )

    def _normalized(self) -> Tensor:
        if self._coefficients:
            return torch.stack([part.normalized() for part in self._coefficients.values()], dim=1)
        dtype = next(iter(self._pool.stores.values())).parameter.dtype  # of a stage without MoE layers
        return torch.zeros(2, 0, *self._pool.coefficient_shape, dtype=dtype, device=self._state.device)


class LayerLender(ExpertLender):
    """Effective weights of one layer at a time, made when it runs and again in its backward.

    Sharded banks are gathered once per step and kept unsharded until its end, with their gradients.
    """

    def __init__(
        self, pool: ExpertPool, coefficients: Mapping[int, Coefficients], state: ParallelState, dtype: torch.dtype
    ):
        self._pool, self._coefficients = pool, dict(coefficients)
        self._state, self._dtype = state, dtype
        self._banks: ExpertWeights | None = None
        self._grads: ExpertWeights | None = None
        self._exits = ExitStack()

    def begin_step(self) -> None:
        """Takes in the banks."""
        self._banks = self._pool.unsharded()

    def experts(self, moe_index: int) -> Experts:
        """Returns a layer's experts, combined when called."""
        assert self._banks is not None, "begin_step comes first"
        if torch.is_grad_enabled():
            self._open_gradients()
        coefficients = self._coefficients[moe_index]
        work = _LayerWork(self._banks, self._grads, self._pool.activation, self._state, self._dtype)

        def run(x_RH: Tensor, rows_per_expert: Counts) -> Tensor:
            return _CombinedMLP.apply(with_backward(x_RH), coefficients.normalized(), rows_per_expert, work)

        return run

    def finish_step(self) -> None:
        """Reduces the gradients of sharded banks; every backward has contracted its own."""
        self._open_gradients()
        self._exits.close()
        self._grads = None

    def costs(self) -> LenderCosts:
        """One layer's weights and their gradients; of sharded banks all, and all their gradients, through a step. Each layer
        and pass combines twice and contracts once."""
        pool, width = self._pool, self._dtype.itemsize
        num_banks, one, stores = pool.coefficient_shape[1], pool.bank_numel, pool.stores.values()
        per_layer = one * (2 * (num_banks * FP32_BYTES + width) + num_banks * 3 * FP32_BYTES + 2 * FP32_BYTES)
        return LenderCosts(
            gathered=2 * FP32_BYTES * sum(s.numel for s in stores) if pool.is_sharded else 0,
            exchange=FP32_BYTES * max(2 * s.numel + s.held for s in stores) if pool.is_sharded else 0,
            workspace=one * (width + FP32_BYTES),
            sent=pool.sent(2 * FP32_BYTES),
            traffic_per_pass=len(self._coefficients) * per_layer,
        )

    def _open_gradients(self) -> None:
        if self._grads is None:
            stores = self._pool.stores.items()
            self._grads = ExpertWeights(**{name: self._exits.enter_context(s.gradient()) for name, s in stores})


@dataclass(frozen=True)
class _LayerWork:
    """Unsharded banks, their gradients (None without gradients), and how a layer computes with them."""

    banks: ExpertWeights
    bank_grads: ExpertWeights | None
    activation: Activation
    state: ParallelState
    dtype: torch.dtype

    def combined(self, a_2GP: Tensor) -> ExpertWeights:
        """Returns one layer's effective weights, [e, ...]."""

        def one(name: str, bank: Tensor) -> Tensor:
            weight = bank.new_empty((1, *bank.shape[1:]), dtype=self.dtype)
            return combine(a_2GP[ROW_OF_WEIGHT[name]].detach()[None], bank, weight)[0]

        return ExpertWeights(**{name: one(name, bank) for name, bank in self.banks.items()})


class _CombinedMLP(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_RH: Tensor, a_2GP: Tensor, rows_per_expert: Counts, work: _LayerWork
    ) -> Tensor:
        weights = without_repeated_bias(work.combined(a_2GP), work.state)
        rows = expert_rows(rows_per_expert, x_RH)
        y_RH, h_RU = grouped_mlp_forward(x_RH, rows, weights, work.activation)
        ctx.save_for_backward(x_RH, a_2GP, h_RU)
        ctx.rest = rows, work
        return y_RH

    @staticmethod
    def backward(ctx: Any, dy_RH: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x_RH, a_2GP, h_RU = ctx.saved_tensors
        rows, work = ctx.rest
        weights = work.combined(a_2GP)
        grads = weights.map(lambda t: torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)))
        dx_RH = grouped_mlp_backward(
            dy_RH,
            x_RH,
            h_RU,
            rows,
            without_repeated_bias(weights, work.state),
            work.activation,
            without_repeated_bias(grads, work.state),
        )
        da_2GP = torch.zeros_like(a_2GP)
        for name, grad in grads.items():
            row = ROW_OF_WEIGHT[name]
            bank, bank_grad = getattr(work.banks, name), getattr(work.bank_grads, name)
            da_2GP[row] += contract(a_2GP[row].detach()[None], bank, grad[None], bank_grad)[0]
        return dx_RH, da_2GP, None, None


def combine(a_LGP: Tensor, bank: Tensor, out: Tensor) -> Tensor:
    """Writes sum_p a[l, g, p] bank[p] into out, [L, e, ...], and returns it; g is all experts (G = 1) or each."""
    groups = a_LGP.shape[1]
    combine_banks(a_LGP, _grouped(bank, groups), out_LGN=_grouped(out, groups))
    return out


def contract(a_LGP: Tensor, bank: Tensor, grad: Tensor, bank_grad: Tensor) -> Tensor:
    """Adds the bank's gradient to bank_grad and returns the coefficients' gradient [L, G, P]."""
    groups = a_LGP.shape[1]
    return combine_banks_backward(a_LGP, _grouped(bank, groups), _grouped(grad, groups), _grouped(bank_grad, groups))


def _grouped(t: Tensor, groups: int) -> Tensor:
    return t.view(t.shape[0], groups, -1)
