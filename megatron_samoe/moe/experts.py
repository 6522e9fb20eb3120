"""Expert weights: their shapes and places over ranks, and the experts that one layer owns itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from megatron_samoe.ops.grouped_mlp import Activation, ExpertWeights, grouped_mlp
from megatron_samoe.parallel_state.shard_spec import ShardSpec
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.tensor_parallel.layers import ZEROS, Init, new_parameter


@dataclass(frozen=True)
class ExpertShape:
    """Global sizes of the routed experts of one layer, or of one bank of the pool."""

    num_experts: int
    hidden_size: int
    ffn_size: int
    activation: Activation
    bias: bool

    def parameters(
        self, num_banks: int | None, init_std: float, output_init_std: float, state: ParallelState, dtype: torch.dtype
    ) -> dict[str, nn.Parameter]:
        """Returns w1, w2 and maybe b1, b2: experts split over ep, F over etp; a leading bank dim for the pool."""
        E, H, F = self.num_experts, self.hidden_size, self.ffn_size
        up = (2, F) if self.activation == "swiglu" else (F,)
        leading = () if num_banks is None else (num_banks,)
        family: Literal["expert", "pool"] = "expert" if num_banks is None else "pool"
        d = len(leading)
        by_expert, f_dim = (d, "ep"), d + len(up)
        inner = (by_expert, (f_dim, "etp"))
        indexed = d + 1
        parameters = {
            "w1": ((*leading, E, *up, H), ShardSpec(family, inner), Init(std=init_std, num_indexed_dims=indexed)),
            "w2": (
                (*leading, E, H, F),
                ShardSpec(family, (by_expert, (d + 2, "etp"))),
                Init(std=output_init_std, num_indexed_dims=indexed),
            ),
        }
        if self.bias:
            parameters["b1"] = ((*leading, E, *up), ShardSpec(family, inner), ZEROS)
            # Every expert-tensor rank holds the output bias, one adds it: gradients are parts of a sum.
            parameters["b2"] = ((*leading, E, H), ShardSpec(family, (by_expert,), partial=("etp",)), ZEROS)
        return {name: new_parameter(*made, state, dtype) for name, made in parameters.items()}


def weights_of(parameters: Mapping[str, nn.Parameter] | nn.ParameterDict) -> ExpertWeights:
    """Returns the parameters as expert weights."""
    return ExpertWeights(**dict(parameters.items()))


def main_grads_of(parameters: Mapping[str, nn.Parameter] | nn.ParameterDict) -> ExpertWeights | None:
    """Returns the parameters' main gradients; None where no gradient buffer holds them."""
    grads = {name: getattr(p, "main_grad", None) for name, p in parameters.items()}
    if any(grad is None for grad in grads.values()):
        return None
    return ExpertWeights(**grads)  # type: ignore[arg-type]


def without_repeated_bias(weights: ExpertWeights, state: ParallelState) -> ExpertWeights:
    """Returns the weights as this rank applies them: results are summed over expert-tensor ranks, the bias only once."""
    return weights if state.etp.rank == 0 else replace(weights, b2=None)


class OwnExperts(nn.Module):
    """The experts of a standard MoE layer: parameters of that layer alone."""

    def __init__(self, shape: ExpertShape, init_std: float, output_init_std: float, state: ParallelState,
                 dtype: torch.dtype):  # fmt: skip
        super().__init__()
        for name, parameter in shape.parameters(None, init_std, output_init_std, state, dtype).items():
            self.register_parameter(name, parameter)
        self.activation, self.state = shape.activation, state

    def forward(self, x_RH: Tensor, rows_per_expert: list[int]) -> Tensor:
        """Returns y_RH; see `types.Experts`."""
        parameters = dict(self.named_parameters())
        weights = without_repeated_bias(weights_of(parameters), self.state)
        grads = main_grads_of(parameters)
        if grads is not None:
            grads = without_repeated_bias(grads, self.state)
        return grouped_mlp(x_RH, rows_per_expert, weights, self.activation, grads)
