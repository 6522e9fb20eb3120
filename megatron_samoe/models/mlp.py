"""The dense MLP, also used as shared expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_samoe.config.model import ModelConfig
from megatron_samoe.ops.grouped_mlp import GELU_FORM, Activation
from megatron_samoe.parallel_state.parameter_tag import Init
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


def activation_of(config: ModelConfig) -> Activation:
    """Returns the activation of MLPs and experts."""
    if config.swiglu:
        return "swiglu"
    return "gelu_exact" if config.exact_gelu else "gelu"


class MLP(nn.Module):
    """Two linear layers, split over tensor-parallel ranks, with GELU (exact or its tanh form) between, or SiLU-gated."""

    def __init__(
        self,
        config: ModelConfig,
        ffn_size: int,
        init_std: float,
        output_init_std: float,
        state: ParallelState,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.activation = activation_of(config)
        self.gated = config.swiglu
        out_dims = (2, ffn_size) if self.gated else (ffn_size,)
        bias = not config.disable_bias_linear
        self.fc1 = ColumnParallelLinear(
            config.hidden_size,
            out_dims,
            len(out_dims) - 1,
            bias=bias,
            init=Init(std=init_std),
            state=state,
            dtype=dtype,
        )
        self.fc2 = RowParallelLinear(
            ffn_size, config.hidden_size, bias=bias, init=Init(std=output_init_std), state=state, dtype=dtype
        )

    def forward(self, x_TH: Tensor) -> Tensor:
        """Returns y_TH."""
        h = self.fc1(x_TH)
        if self.gated:
            gate, up = h.chunk(2, -1)
            return self.fc2(nn.functional.silu(gate) * up)
        return self.fc2(nn.functional.gelu(h, approximate=GELU_FORM[self.activation]))
