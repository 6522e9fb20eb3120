"""The combination of banks and its backward in plain torch, some elements at a time: each pass reads its operands once
and holds no copy of the weights.

`reference` says the same in one expression, which would hold all layers' weights in fp32. Chunks are small enough for a
GPU's L2 cache, where what one product leaves is read by the next.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_samoe.ops.extension import accumulation_dtype

#: Elements of all layers' weights and all banks in a chunk.
_CHUNK_ELEMENTS = 1 << 24
#: Products that are summed in fp32 before sums are added in double precision.
_SUM_BLOCK = 512


def combine(coefficients_LGP: Tensor, banks_PGN: Tensor, out_LGN: Tensor) -> None:
    """Writes sum over p of coefficients[l, g, p] * banks[p, g] into out[l, g]."""
    a_GLP = coefficients_LGP.to(accumulation_dtype(banks_PGN.dtype)).transpose(0, 1)
    for g, n in _chunks(out_LGN, len(banks_PGN)):
        part_GLN = torch.matmul(a_GLP[g], banks_PGN[:, g, n].transpose(0, 1).to(a_GLP.dtype))
        out_LGN[:, g, n] = part_GLN.transpose(0, 1)


def combine_backward(coefficients_LGP: Tensor, banks_PGN: Tensor, dW_LGN: Tensor, dbanks_PGN: Tensor) -> Tensor:
    """Adds the banks' gradient to dbanks and returns the coefficients' gradient [L, G, P] in fp64."""
    dtype = accumulation_dtype(banks_PGN.dtype)
    a_GPL = coefficients_LGP.to(dtype).permute(1, 2, 0)
    sums_GLP = a_GPL.new_zeros((a_GPL.shape[0], a_GPL.shape[2], a_GPL.shape[1]), dtype=torch.float64)
    for g, n in _chunks(dW_LGN, len(banks_PGN)):
        dW_GLN, banks_GPN = (t[:, g, n].transpose(0, 1).to(dtype) for t in (dW_LGN, banks_PGN))
        dbanks_PGN[:, g, n] += torch.matmul(a_GPL[g], dW_GLN).transpose(0, 1)
        sums_GLP[g] += _dot_products(dW_GLN, banks_GPN)
    return sums_GLP.transpose(0, 1)


def _dot_products(x_GLN: Tensor, y_GPN: Tensor) -> Tensor:
    """Returns <x[g, l], y[g, p]> as [G, L, P] in fp64."""
    complete = x_GLN.shape[2] // _SUM_BLOCK * _SUM_BLOCK
    sums_GLP = torch.matmul(x_GLN[:, :, complete:], y_GPN[:, :, complete:].mT).double()
    if complete:
        x_GbLs, y_GbPs = (t[:, :, :complete].unflatten(2, (-1, _SUM_BLOCK)).transpose(1, 2) for t in (x_GLN, y_GPN))
        sums_GLP += torch.matmul(x_GbLs, y_GbPs.mT).sum(1, dtype=torch.float64)
    return sums_GLP


def _chunks(weights_LGN: Tensor, num_banks: int) -> Iterator[tuple[slice, slice]]:
    """Yields groups and elements of chunks."""
    num_layers, num_groups, num_elements = weights_LGN.shape
    size = max(_CHUNK_ELEMENTS // max(num_layers + num_banks, 1), _SUM_BLOCK)
    groups = max(size // max(num_elements, 1), 1)
    for group in range(0, num_groups, groups):
        for first in range(0, num_elements, size):
            yield slice(group, group + groups), slice(first, first + size)
