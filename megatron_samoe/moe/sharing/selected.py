"""Layers that take one bank for each expert, at most times a factor: nothing has to be combined, and banks stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_samoe.errors import ConfigError
from megatron_samoe.moe.experts import without_repeated_bias
from megatron_samoe.moe.sharing.coefficients import ROW_OF_WEIGHT, Coefficients
from megatron_samoe.moe.sharing.expert_pool import FP32_BYTES, ExpertPool
from megatron_samoe.moe.sharing.way import ExpertLender, LenderCosts
from megatron_samoe.moe.types import Experts
from megatron_samoe.ops.grouped_mlp import Counts, ExpertWeights, grouped_mlp
from megatron_samoe.parallel_state.state import ParallelState


@dataclass(frozen=True)
class OneBank:
    """Which bank each group of experts of a layer takes, and by what factor: for w1 and for w2; int64 and fp32, [2, G]."""

    bank_2G: Tensor
    factor_2G: Tensor


def one_bank(a_2GP: Tensor) -> OneBank | None:
    """Returns the banks that coefficients select; None where they combine several."""
    if ((a_2GP != 0).sum(-1) > 1).any():
        return None
    bank_2G = a_2GP.abs().argmax(-1)
    return OneBank(bank_2G, a_2GP.gather(-1, bank_2G[..., None])[..., 0].float())


class SelectedLender(ExpertLender):
    """Lends each layer the experts of the one bank that it takes, as they lie in the pool, to a model that does not train; see
    `way.ExpertLender`.

    Raises:
        ConfigError: experts of a layer take unlike banks.
    """

    def __init__(
        self, pool: ExpertPool, coefficients: Mapping[int, Coefficients], state: ParallelState, dtype: torch.dtype
    ):
        self._pool, self._state, self._dtype = pool, state, dtype
        self._weights: dict[str, Tensor] = {}
        self._choices: dict[int, tuple[list[int], list[float]]] = {}
        for moe_index, part in coefficients.items():
            one = one_bank(part.normalized().detach())
            assert one is not None
            if (one.bank_2G != one.bank_2G[:, :1]).any() or (one.factor_2G != one.factor_2G[:, :1]).any():
                raise ConfigError("serving", "selected", "needs one process where experts of a layer take unlike banks")
            self._choices[moe_index] = one.bank_2G[:, 0].tolist(), one.factor_2G[:, 0].tolist()

    def begin_step(self) -> None:
        """Takes in the banks."""
        self._weights = {name: bank.to(self._dtype) for name, bank in self._pool.unsharded().items()}

    def finish_step(self) -> None:
        """Selected experts have no gradients."""

    def costs(self) -> LenderCosts:
        """Banks in the compute dtype, unless unsharded ones are used as they are."""
        copies = self._pool.is_sharded or self._dtype.itemsize != FP32_BYTES
        banks = sum(store.numel for store in self._pool.stores.values())
        return LenderCosts(weights=banks * self._dtype.itemsize if copies else 0)

    def experts(self, moe_index: int) -> Experts:
        """Returns a layer's experts."""
        (bank1, bank2), (factor1, factor2) = self._choices[moe_index]
        parts = {n: t[bank1 if ROW_OF_WEIGHT[n] == 0 else bank2] for n, t in self._weights.items()}
        if "b1" in parts:
            parts["b1"] = parts["b1"] * factor1
        weights = without_repeated_bias(ExpertWeights(**parts), self._state)
        activation = self._pool.activation

        def run(x_RH: Tensor, rows_per_expert: Counts) -> Tensor:
            # factor1 (W1 x + b1) = W1 (factor1 x) + factor1 b1
            return grouped_mlp(x_RH * factor1, rows_per_expert, weights, activation) * factor2

        return run
