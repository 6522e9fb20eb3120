"""Attention of some queries to some keys, as a part of attention to all: each piece has the log-sum-exp of its scores.

Two pieces with the same queries add up by their log-sum-exps (`merge`). The gradients of a piece need only the result and the
log-sum-exp of all pieces. So pieces come and go, and no scores are kept. `reference.attention_piece` is the reference implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_samoe.ops import reference


def attention_piece(
    q_BASD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns y_BASD and lse_BAS, in fp32 or fp64, of attention to these keys only.

    Args:
        is_causal: query i attends to keys 0 to i, else to all.
    """
    if q_BASD.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        y_BASD, lse_BAS = flash(q_BASD, k_BGLD, v_BGLD, 0.0, is_causal, scale=scale)
        return y_BASD, lse_BAS
    if _takes_flash(q_BASD):
        k_BALD, v_BALD = _for_each_head(q_BASD, k_BGLD, v_BGLD)
        y_BASD, lse_BAS, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q_BASD, k_BALD, v_BALD, 0.0, is_causal, scale=scale
        )
        return y_BASD, lse_BAS
    return reference.attention_piece(q_BASD, k_BGLD, v_BGLD, is_causal, scale)


def attention_piece_backward(
    dy_BASD: Tensor,
    q_BASD: Tensor,
    k_BGLD: Tensor,
    v_BGLD: Tensor,
    y_BASD: Tensor,
    lse_BAS: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq_BASD, dk_BGLD and dv_BGLD, as far as they come from these keys.

    Args:
        dy_BASD, y_BASD, lse_BAS: of attention to all keys.
    """
    if q_BASD.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = flash(dy_BASD, q_BASD, k_BGLD, v_BGLD, y_BASD, lse_BAS, 0.0, is_causal, scale=scale)
        return dq, dk, dv
    if _takes_flash(q_BASD):
        k_BALD, v_BALD = _for_each_head(q_BASD, k_BGLD, v_BGLD)
        none = q_BASD.new_empty(0, dtype=torch.int64)  # no sequences of unlike lengths, and no dropout's generator
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            dy_BASD,
            q_BASD,
            k_BALD,
            v_BALD,
            y_BASD,
            lse_BAS.contiguous(),
            None,
            None,
            q_BASD.shape[2],
            k_BALD.shape[2],
            0.0,
            is_causal,
            none,
            none,
            scale=scale,
        )
        groups = k_BGLD.shape[1]
        return dq, dk.unflatten(1, (groups, -1)).sum(2), dv.unflatten(1, (groups, -1)).sum(2)
    return reference.attention_piece_backward(dy_BASD, q_BASD, k_BGLD, v_BGLD, y_BASD, lse_BAS, is_causal, scale)


def merge(y_BASD: Tensor, lse_BAS: Tensor, more_BASD: Tensor, more_lse_BAS: Tensor) -> None:
    """Adds attention of the same queries to more keys, in place; y is in the precision of its log-sum-exp."""
    # Weights of the two, sigmoids of their difference, are never above 1.
    weight_BAS1 = torch.sigmoid(more_lse_BAS - lse_BAS)[..., None]
    y_BASD.lerp_(more_BASD.to(y_BASD.dtype), weight_BAS1)
    lse_BAS.copy_(torch.logaddexp(lse_BAS, more_lse_BAS))


def _takes_flash(q: Tensor) -> bool:
    """Whether CUDA's flash attention takes it. Tensors without storage are planned for it."""
    fits = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return q.is_meta or (q.is_cuda and fits)


def _for_each_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    times = q.shape[1] // k.shape[1]
    return k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
