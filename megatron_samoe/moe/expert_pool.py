"""The pool of expert banks that all MoE layers share, and the experts that layers borrow from it.

    W[l, e] = sum_b A[l, b] T[b, e]                  dT = A^T dW,   dA = dW T^T

with banks T, layer coefficients A and effective weights W (SaMoE, Zhang et al. 2022). A and T do not change within an
optimizer step, so `StepCombination` makes all W once at its start and contracts the summed dW once at its end;
`LayerCombination` makes one layer's W when it runs and again in its backward, and contracts dW at once. Both give
autograd's gradients up to the order of sums.

The rank's model owns one pool and one combination and lends them to its layers for each call; no layer keeps them.
Banks and coefficients are fp32 whatever the compute dtype: they are their own master weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.moe.combination import ROW_OF_WEIGHT, bank_std_factor, normalize_coefficients
from megatron_samoe.moe.experts import ExpertShape, main_grads_of, weights_of, without_repeated_bias
from megatron_samoe.moe.types import Experts
from megatron_samoe.ops.combine import combine_banks, combine_banks_backward
from megatron_samoe.ops.grouped_mlp import (
    ExpertWeights,
    grouped_mlp,
    grouped_mlp_backward,
    grouped_mlp_forward,
    with_backward,
)
from megatron_samoe.parallel_state.state import ParallelState


class ExpertPool(nn.Module):
    """P banks of E experts each: `bank.w1` is [P, e, F, H] (or [P, e, 2, F, H]), and so on."""

    def __init__(self, config: MoEConfig, shape: ExpertShape, init_std: float, output_init_std: float,
                 state: ParallelState, dtype: torch.dtype):  # fmt: skip
        super().__init__()
        factor = bank_std_factor(config)
        dtype = torch.promote_types(dtype, torch.float32)
        stds = (init_std * factor, output_init_std * factor)
        self.bank = nn.ParameterDict(shape.parameters(config.num_expert_banks, *stds, state, dtype))
        self.activation = shape.activation


class Combination(Protocol):
    """Lends experts to layers during one optimizer step."""

    def begin_step(self) -> None:
        """Takes in the current banks and coefficients; to be called whenever they have changed."""

    def experts(self, moe_index: int) -> Experts:
        """Returns the experts of an MoE layer."""

    def finish_step(self) -> None:
        """Completes this rank's gradients of banks and coefficients, in their main gradients."""


def make_combination(
    config: MoEConfig, pool: ExpertPool, coefficients: Sequence[nn.Parameter], state: ParallelState, dtype: torch.dtype
) -> StepCombination | LayerCombination:
    """Returns the combination that --samoe-combine asks for.

    Args:
        coefficients: of each MoE layer on this rank, [2, G, P].
        dtype: of the effective weights.
    """
    kind = StepCombination if config.samoe_combine == "step" else LayerCombination
    return kind(pool, list(coefficients), config.samoe_normalization, state, dtype)


class StepCombination:
    """Effective weights of all layers, made once per step; their gradients, contracted once per step."""

    def __init__(self, pool: ExpertPool, coefficients: list[nn.Parameter], normalization: str, state: ParallelState,
                 dtype: torch.dtype):  # fmt: skip
        self._pool, self._coefficients, self._normalization = pool, coefficients, normalization
        self._state, self._dtype = state, dtype
        self._weights: ExpertWeights | None = None
        self._grads: ExpertWeights | None = None

    def begin_step(self) -> None:
        """Combines all layers' weights, one pass over the banks."""
        banks = weights_of(self._pool.bank)
        if self._weights is None:
            layers = len(self._coefficients)
            self._weights = banks.map(lambda t: t.new_empty((layers, *t.shape[1:]), dtype=self._dtype))
        a_2LGP = self._normalized().detach()
        for name, weight in self._weights.items():
            combine(a_2LGP[ROW_OF_WEIGHT[name]], getattr(banks, name).detach(), weight)

    def experts(self, moe_index: int) -> Experts:
        """Returns a layer's experts, plain weights with a gradient buffer of their own."""
        assert self._weights is not None, "begin_step comes first"
        if torch.is_grad_enabled() and self._grads is None:
            self._grads = self._weights.map(lambda t: torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)))
        weights = without_repeated_bias(self._weights.map(lambda t: t[moe_index]), self._state)
        grads = None
        if self._grads is not None:
            grads = without_repeated_bias(self._grads.map(lambda t: t[moe_index]), self._state)
        activation = self._pool.activation

        def run(x_RH: Tensor, rows_per_expert: list[int]) -> Tensor:
            return grouped_mlp(x_RH, rows_per_expert, weights, activation, grads)

        return run

    def finish_step(self) -> None:
        """Contracts the layers' summed weight gradients and clears them."""
        if self._grads is None:
            return
        banks, bank_grads = weights_of(self._pool.bank), main_grads_of(self._pool.bank)
        assert bank_grads is not None, "a gradient buffer holds the pool's main gradients"
        with torch.enable_grad():
            a_2LGP = self._normalized()
        da_2LGP = torch.zeros_like(a_2LGP)
        for name, grad in self._grads.items():
            row = ROW_OF_WEIGHT[name]
            da_2LGP[row] += contract(a_2LGP[row].detach(), getattr(banks, name).detach(), grad, getattr(bank_grads, name))
            grad.zero_()
        trained = [c for c in self._coefficients if c.requires_grad]
        if trained:
            for c, dc in zip(trained, torch.autograd.grad(a_2LGP, trained, da_2LGP), strict=True):
                c.main_grad += dc  # type: ignore[attr-defined]

    def layer_gradients(self) -> ExpertWeights | None:
        """Returns this rank's gradients of the effective weights so far, [L, e, ...]; None before the first backward."""
        return self._grads

    def _normalized(self) -> Tensor:
        raw_2LGP = torch.stack(list(self._coefficients), dim=1)
        return normalize_coefficients(raw_2LGP, self._normalization)


class LayerCombination:
    """Effective weights of one layer at a time, made when it runs and again in its backward."""

    def __init__(self, pool: ExpertPool, coefficients: list[nn.Parameter], normalization: str, state: ParallelState,
                 dtype: torch.dtype):  # fmt: skip
        self._pool, self._coefficients, self._normalization = pool, coefficients, normalization
        self._state, self._dtype = state, dtype

    def begin_step(self) -> None:
        """Nothing to prepare."""

    def experts(self, moe_index: int) -> Experts:
        """Returns a layer's experts, combined when called."""
        pool, state, dtype = self._pool, self._state, self._dtype
        raw, normalization = self._coefficients[moe_index], self._normalization

        def run(x_RH: Tensor, rows_per_expert: list[int]) -> Tensor:
            a_2GP = normalize_coefficients(raw, normalization)
            return _CombinedMLP.apply(with_backward(x_RH), a_2GP, rows_per_expert, pool, state, dtype)

        return run

    def finish_step(self) -> None:
        """Nothing is left to do: every backward has contracted its own gradients."""


class _CombinedMLP(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_RH: Tensor, a_2GP: Tensor, rows: list[int], pool: ExpertPool, state: ParallelState, dtype: torch.dtype
    ) -> Tensor:
        weights = without_repeated_bias(combined_layer(pool, a_2GP, dtype), state)
        y_RH, h, a_RF = grouped_mlp_forward(x_RH, rows, weights, pool.activation)
        ctx.save_for_backward(x_RH, a_2GP, h, a_RF)
        ctx.rest = rows, pool, state, dtype
        return y_RH

    @staticmethod
    def backward(ctx: Any, dy_RH: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x_RH, a_2GP, h, a_RF = ctx.saved_tensors
        rows, pool, state, dtype = ctx.rest
        weights = combined_layer(pool, a_2GP, dtype)
        grads = weights.map(lambda t: torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)))
        dx_RH = grouped_mlp_backward(
            dy_RH, x_RH, h, a_RF, rows, without_repeated_bias(weights, state), pool.activation,
            without_repeated_bias(grads, state),
        )  # fmt: skip
        banks, bank_grads = weights_of(pool.bank), main_grads_of(pool.bank)
        assert bank_grads is not None, "a gradient buffer holds the pool's main gradients"
        da_2GP = torch.zeros_like(a_2GP)
        for name, grad in grads.items():
            row = ROW_OF_WEIGHT[name]
            bank, bank_grad = getattr(banks, name).detach(), getattr(bank_grads, name)
            da_2GP[row] += contract(a_2GP[row].detach()[None], bank, grad[None], bank_grad)[0]
        return dx_RH, da_2GP, None, None, None, None


def combined_layer(pool: ExpertPool, a_2GP: Tensor, dtype: torch.dtype) -> ExpertWeights:
    """Returns one layer's effective weights, [e, ...]."""

    def one(name: str, bank: Tensor) -> Tensor:
        weight = bank.new_empty((1, *bank.shape[1:]), dtype=dtype)
        return combine(a_2GP[ROW_OF_WEIGHT[name]].detach()[None], bank.detach(), weight)[0]

    return ExpertWeights(**{name: one(name, bank) for name, bank in weights_of(pool.bank).items()})


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
