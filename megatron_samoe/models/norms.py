"""LayerNorm and RMSNorm over the last dim, on one rank or split over ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_samoe.config.model import ModelConfig
from megatron_samoe.parallel_state.parameter_tag import ONES, ParameterTag
from megatron_samoe.parallel_state.shard_spec import ShardSpec
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.tensor_parallel.layers import new_parameter, token_wise_spec
from megatron_samoe.tensor_parallel.mappings import sum_over_tensor_parallel_region


class Norm(nn.Module):
    """The configured normalisation, with all weights on every tensor-parallel rank.

    Args:
        split_input: whether tensor-parallel ranks normalise different vectors (heads), so that each has only a part of
            the weights' gradient.
    """

    def __init__(
        self, config: ModelConfig, size: int, state: ParallelState, dtype: torch.dtype, split_input: bool = False
    ):
        super().__init__()
        self.epsilon = config.norm_epsilon
        spec = ShardSpec(partial=("tp",)) if split_input else token_wise_spec(state)
        self.weight = new_parameter((size,), ParameterTag(spec, ONES), state, dtype)
        has_bias = config.normalization == "LayerNorm"
        self.bias = new_parameter((size,), ParameterTag(spec), state, dtype) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Returns x [..., size] normalised over its last dim."""
        if self.bias is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


class SplitNorm(nn.Module):
    """RMSNorm over vectors whose channels are split over tensor-parallel ranks, as its weights are.

    Args:
        size: of the full vector.
    """

    bias = None

    def __init__(self, config: ModelConfig, size: int, state: ParallelState, dtype: torch.dtype):
        super().__init__()
        self.epsilon, self.size, self.group = config.norm_epsilon, size, state.tp
        self.weight = new_parameter((size,), ParameterTag(ShardSpec(partition=((0, "tp"),)), ONES), state, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x [..., size / tp] over the root mean square of the full vector."""
        if self.group.size == 1:
            return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        total = sum_over_tensor_parallel_region(wide.square().sum(-1, keepdim=True), self.group)
        return (wide * (total / self.size + self.epsilon).rsqrt() * self.weight).to(x.dtype)
