"""Rotary position embedding (RoFormer, arXiv:2104.09864), first half of the rotated channels paired with the second.

Angles may be stretched for longer sequences; the formulas are those of transformers (`modeling_rope_utils.py`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_samoe.config.model import ModelConfig


def rotary_tables(config: ModelConfig, positions_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cos and sin, [B, S, 1, R] with R rotated channels, made in fp32."""
    frequencies, factor = scaled_frequencies(config, positions_BS.device)
    angles = positions_BS[..., None].float() * frequencies
    angles = torch.cat((angles, angles), -1)[:, :, None]
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def scaled_frequencies(config: ModelConfig, device: torch.device | None = None) -> tuple[Tensor, float]:
    """Returns the angle of one position for each pair of channels, [R / 2] in fp32, and a factor on queries and keys."""
    rotated, stretch = config.rotary_dim, config.rope_scaling_factor
    exponents = torch.arange(0, rotated, 2, device=device, dtype=torch.float32) / rotated
    plain, kind = config.rotary_base**-exponents, config.rope_scaling_type
    if kind == "linear":
        return plain / stretch, 1.0
    if kind == "llama3":
        return _llama3(config, plain), 1.0
    if kind == "yarn":
        keeps = 1 - _yarn_ramp(config, rotated).to(plain)
        given = config.yarn_attention_factor
        factor = 0.1 * math.log(stretch) + 1.0 if given is None else given
        return plain / stretch * (1 - keeps) + plain * keeps, factor
    return plain, 1.0


def _llama3(config: ModelConfig, plain: Tensor) -> Tensor:
    """Stretches angles by how often they turn over the trained length: few times in full, many times not at all."""
    assert config.rope_original_max_positions is not None
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_max_positions * plain / (2 * math.pi)
    keeps = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keeps) * plain / config.rope_scaling_factor + keeps * plain


def _yarn_ramp(config: ModelConfig, rotated: int) -> Tensor:
    """Returns how far each pair's angle is stretched, from 0 to 1, [R / 2]."""
    trained = config.rope_original_max_positions
    assert trained is not None

    def channel(turns: float) -> float:
        """The channel whose angle turns so often over the trained length."""
        return rotated * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rotary_base))

    first = max(math.floor(channel(config.yarn_beta_fast)), 0)
    last = min(math.ceil(channel(config.yarn_beta_slow)), rotated - 1)
    width = last - first if last != first else 0.001
    return ((torch.arange(rotated // 2, dtype=torch.float32) - first) / width).clamp(0, 1)


def apply_rotary(x_BSAD: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Returns x with its first R channels of each head rotated by its position."""
    cos, sin = tables
    rotated = cos.shape[-1]
    turn, rest = x_BSAD[..., :rotated], x_BSAD[..., rotated:]
    first, second = turn.chunk(2, -1)
    turned = turn * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned
