"""Rotary position embedding (RoFormer, arXiv:2104.09864), first half of the rotated channels paired with the second."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_samoe.config.model import ModelConfig


def rotary_tables(config: ModelConfig, positions_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cos and sin, [B, S, 1, R] with R rotated channels, made in fp32."""
    rotated = int(config.head_dim * config.rotary_percent)
    exponents = torch.arange(0, rotated, 2, device=positions_BS.device, dtype=torch.float32) / rotated
    angles = positions_BS[..., None].float() * config.rotary_base**-exponents
    angles = torch.cat((angles, angles), -1)[:, :, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x_BSAD: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Returns x with its first R channels of each head rotated by its position."""
    cos, sin = tables
    rotated = cos.shape[-1]
    turn, rest = x_BSAD[..., :rotated], x_BSAD[..., rotated:]
    first, second = turn.chunk(2, -1)
    turned = turn * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned
