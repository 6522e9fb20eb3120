"""The expert weights of all layers as weighted sums of the pool's banks, in one pass.

Letters: L layers, G groups (experts or tensor kinds that share a coefficient vector), P banks, N elements of a group.
Both are plain functions that autograd does not record: the pool calls them once a step, around the layers' own
gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_samoe.ops import combine_chunks, extension


def _check(coefficients_LGP: Tensor, banks_PGN: Tensor, weights_LGN: Tensor | None, name: str) -> None:
    if coefficients_LGP.dim() != 3 or banks_PGN.dim() != 3:
        raise ValueError(
            f"coefficients {tuple(coefficients_LGP.shape)} and banks {tuple(banks_PGN.shape)} need 3 dims each"
        )
    num_layers, num_groups, num_banks = coefficients_LGP.shape
    if tuple(banks_PGN.shape[:2]) != (num_banks, num_groups):
        raise ValueError(f"banks are {tuple(banks_PGN.shape)}; [{num_banks}, {num_groups}, N] fits the coefficients")
    expected = (num_layers, num_groups, banks_PGN.shape[2])
    if weights_LGN is not None and tuple(weights_LGN.shape) != expected:
        raise ValueError(f"{name} is {tuple(weights_LGN.shape)}, not {expected}")


def _served(*tensors: Tensor) -> bool:
    """Returns whether the compiled kernels take these tensors without a copy (last dim contiguous, others strided)."""
    return all(t.stride(2) == 1 or t.shape[2] <= 1 for t in tensors) and extension.serves(*tensors, cuda="combination")


@torch.no_grad()
def combine_banks(
    coefficients_LGP: Tensor, banks_PGN: Tensor, out_LGN: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Returns W_LGN, W[l, g, n] = sum over p of coefficients[l, g, p] * banks[p, g, n], accumulated in fp32.

    Args:
        coefficients_LGP, banks_PGN: fp32 (or fp64); dims 0 and 1 may be strided. A coefficient of 0 leaves its bank
            unread.
        out_LGN: where to write, fp32 or bf16; returned.
        out_dtype: dtype of a fresh result, the banks' by default.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check(coefficients_LGP, banks_PGN, out_LGN, "out_LGN")
    if out_LGN is not None and out_dtype not in (None, out_LGN.dtype):
        raise ValueError(f"out_dtype = {out_dtype}: out_LGN is {out_LGN.dtype}")
    dtype = out_LGN.dtype if out_LGN is not None else out_dtype or banks_PGN.dtype
    out = out_LGN
    if out is None:
        shape = (coefficients_LGP.shape[0], *banks_PGN.shape[1:])
        out = torch.empty(shape, dtype=dtype, device=banks_PGN.device)
    if banks_PGN.dtype == coefficients_LGP.dtype == torch.float32 and _served(banks_PGN, out):
        torch.ops.megatron_samoe.combine_banks(coefficients_LGP.contiguous(), banks_PGN, out)
        return out
    combine_chunks.combine(coefficients_LGP, banks_PGN, out)
    return out


@torch.no_grad()
def combine_banks_backward(coefficients_LGP: Tensor, banks_PGN: Tensor, dW_LGN: Tensor, dbanks_PGN: Tensor) -> Tensor:
    """Adds the banks' gradient to dbanks_PGN in place and returns dcoefficients_LGP, in one pass over dW_LGN.

    dcoefficients are sums of N products; sums of blocks are added in double precision.

    Args:
        coefficients_LGP, banks_PGN, dW_LGN, dbanks_PGN: fp32 (or fp64); dims 0 and 1 may be strided.

    Raises:
        ValueError: shapes do not fit.
    """
    _check(coefficients_LGP, banks_PGN, dW_LGN, "dW_LGN")
    if dbanks_PGN.shape != banks_PGN.shape:
        raise ValueError(f"dbanks_PGN is {tuple(dbanks_PGN.shape)}, not {tuple(banks_PGN.shape)}")
    tensors = (banks_PGN, dW_LGN, dbanks_PGN)
    if all(t.dtype == torch.float32 for t in (coefficients_LGP, *tensors)) and _served(*tensors):
        dcoefficients_LGP: Tensor = torch.ops.megatron_samoe.combine_banks_backward(
            coefficients_LGP.contiguous(), banks_PGN, dW_LGN, dbanks_PGN
        )
        return dcoefficients_LGP
    dcoefficients_LGP = combine_chunks.combine_backward(coefficients_LGP, banks_PGN, dW_LGN, dbanks_PGN)
    return dcoefficients_LGP.to(coefficients_LGP.dtype)
