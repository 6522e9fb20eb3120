"""The MLP that every token passes, weighed by each token: against routed experts (the residual MoE of DeepSpeed-MoE,
arXiv:2201.05596), or next to them (the shared expert of Qwen1.5-MoE).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_samoe.parallel_state.parameter_tag import Init, ParameterTag
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.tensor_parallel.layers import new_parameter, token_wise_spec


class Mixing(nn.Module):
    """c_routed * routed + c_dense * dense with (c_routed, c_dense) = softmax(W x + b), computed in fp32 or better."""

    def __init__(self, hidden_size: int, init_std: float, state: ParallelState, dtype: torch.dtype):
        super().__init__()
        spec, dtype = token_wise_spec(state), torch.promote_types(dtype, torch.float32)
        self.weight = new_parameter((2, hidden_size), ParameterTag(spec, Init(std=init_std)), state, dtype)
        self.bias = new_parameter((2,), ParameterTag(spec), state, dtype)

    def forward(self, x_TH: Tensor, routed_TH: Tensor, dense_TH: Tensor) -> Tensor:
        """Returns y_TH, for the tokens that this rank holds."""
        c_T2 = nn.functional.linear(x_TH.to(self.weight.dtype), self.weight, self.bias).softmax(-1).to(x_TH.dtype)
        return c_T2[:, :1] * routed_TH + c_T2[:, 1:] * dense_TH


class SharedExpertGate(nn.Module):
    """routed + sigmoid(w x) * shared, with the gate computed in fp32 or better."""

    def __init__(self, hidden_size: int, init_std: float, state: ParallelState, dtype: torch.dtype):
        super().__init__()
        tag, dtype = ParameterTag(token_wise_spec(state), Init(std=init_std)), torch.promote_types(dtype, torch.float32)
        self.weight = new_parameter((1, hidden_size), tag, state, dtype)

    def forward(self, x_TH: Tensor, routed_TH: Tensor, shared_TH: Tensor) -> Tensor:
        """Returns y_TH, for the tokens that this rank holds."""
        gate_T1 = nn.functional.linear(x_TH.to(self.weight.dtype), self.weight).sigmoid().to(x_TH.dtype)
        return routed_TH + gate_T1 * shared_TH
