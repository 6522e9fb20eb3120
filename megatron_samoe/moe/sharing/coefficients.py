"""Coefficients of SaMoE: how raw parameters become the weights of banks, and how they begin.

A layer's coefficients are [2, G, P]: one row for the input projections (w1, b1), one for the output projections (w2,
b2); G is 1, or the number of local experts where each expert has its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.parallel_state.parameter_tag import Init, ParameterTag
from megatron_samoe.parallel_state.shard_spec import ShardSpec
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.tensor_parallel.layers import new_parameter

#: Which coefficient row serves which expert weight.
ROW_OF_WEIGHT = {"w1": 0, "b1": 0, "w2": 1, "b2": 1}
#: Weight that a softmax start gives a layer's first bank; a softmax cannot begin one-hot.
SOFTMAX_START = 0.9
UNIFORM_NOISE_STD = 0.01


def normalize_coefficients(raw: Tensor, normalization: str) -> Tensor:
    """Returns the weights of banks, normalised over the last dim as --samoe-normalization says."""
    if normalization == "softmax":
        return raw.softmax(-1)
    if normalization == "l2":
        return raw / raw.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return raw


def coefficient_spec(config: MoEConfig) -> ShardSpec:
    """Returns the coefficients' sharding: each rank's gradient is a sum over its own experts and F-slices."""
    if config.samoe_granularity == "expert":
        return ShardSpec("expert", partition=((1, "ep"),), partial=("etp",))
    return ShardSpec("expert", partial=("etp", "ep"))


def initial_coefficients(config: MoEConfig, moe_index: int, num_moe_layers: int) -> Tensor:
    """Returns the raw start of one layer as [P]; without the uniform start's noise."""
    banks = config.num_expert_banks
    if config.samoe_init == "uniform":
        return torch.full((banks,), 0.0 if config.samoe_normalization == "softmax" else 1 / math.sqrt(banks))
    own = moe_index % banks if config.samoe_init == "cyclic" else moe_index * banks // num_moe_layers
    raw = torch.zeros(banks)
    raw[own] = 1.0
    if config.samoe_normalization == "softmax" and banks > 1:
        raw[own] = math.log(SOFTMAX_START * (banks - 1) / (1 - SOFTMAX_START))
    return raw


def coefficient_init(config: MoEConfig, moe_index: int, num_moe_layers: int) -> Init:
    """Returns how a layer's coefficients begin."""
    mean = initial_coefficients(config, moe_index, num_moe_layers)
    return Init(mean=mean, std=UNIFORM_NOISE_STD if config.samoe_init == "uniform" else 0.0)


class Coefficients(nn.Module):
    """How one layer combines the banks; what the layer owns of its experts."""

    def __init__(
        self,
        config: MoEConfig,
        moe_index: int,
        num_moe_layers: int,
        num_experts: int,
        state: ParallelState,
        dtype: torch.dtype,
    ):
        super().__init__()
        self._normalization = config.samoe_normalization
        self.is_per_expert = config.samoe_granularity == "expert"
        groups = num_experts if self.is_per_expert else 1
        init = coefficient_init(config, moe_index, num_moe_layers)
        # The layers' gradients are contracted with the banks once, at a step's end.
        tag = ParameterTag(coefficient_spec(config), init, completed_at="step_end")
        shape = (2, groups, config.num_expert_banks)
        self.coefficients = new_parameter(shape, tag, state, torch.promote_types(dtype, torch.float32))
        self.coefficients.requires_grad_(not config.samoe_freeze_coefficients)

    def normalized(self) -> Tensor:
        """Returns the weights of banks, [2, G, P]."""
        return normalize_coefficients(self.coefficients, self._normalization)


def bank_std_factor(config: MoEConfig) -> float:
    """Returns the factor on the banks' initial spread that gives combined experts a normal expert's: 1 / ||A_l||."""
    start = normalize_coefficients(initial_coefficients(config, 0, 1), config.samoe_normalization)
    return 1.0 / float(start.norm())
