"""Muon: momentum whose matrices are made orthogonal, so that all directions of a matrix are learned equally fast.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); scale and weight decay as in J. Liu et
al., "Muon is Scalable for LLM Training" (Moonlight, arXiv:2502.16982).

    m <- momentum * m + g            u = g + momentum * m  (Nesterov), else m
    w <- w - lr * (scale * NewtonSchulz(u) + weight_decay * w)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from megatron_samoe.config.training import OptimizerConfig
from megatron_samoe.ops import extension
from megatron_samoe.optimizer.update import Update

UpdateScale: TypeAlias = Literal["spectral", "unit_rms_norm", "shape_scaling"]
#: Of the quintic polynomial a x + b x^3 + c x^5 (Jordan): after five steps singular values lie within 0.7 to 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7
#: On a CPU the compiled kernel takes matrices of at most this many elements, each in a core's cache and its symmetric products
#: by half: 1.6 to 1.9 times the speed of torch's batched products.
COMPILED_ELEMENTS = 1 << 16
#: On a CPU each thread takes this number of elements through all steps before the next, in its cache (1.4 times the speed);
#: a single matrix is not stacked: bf16 products of a stack are 1.35 times slower.
CACHED_ELEMENTS = 1 << 18
#: Steps whose polynomials are multiplied before matrices at least twice as long as wide are: 0.78 of the products at 2:1, 0.61
#: at 4:1. In fp32 three at once have the errors of single ones; of all five, small singular values have 5 to 50 times as large
#: ones, and bf16 has no digits for any.
STEPS_AT_ONCE = 3


def newton_schulz(x: Tensor, num_steps: int) -> Tensor:
    """Returns matrices [*stacked, rows, columns], stacked or not, with singular values near 1 and the same singular vectors,
    as polynomials of each.

    The polynomial is applied to x over its Frobenius norm; a zero matrix stays zero. Of a few steps the polynomials, p = a I +
    b g + c g^2 of g = x x^T, are multiplied first: they commute, and g becomes p g p without x.
    """
    a, b, c = COEFFICIENTS
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT.contiguous() if is_tall else x  # as it is copied for some products otherwise, at each of them
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(EPSILON)
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    at_once = steps_at_once(x.shape[-2], x.shape[-1], x.dtype)
    for first in range(0, num_steps, at_once):
        gram = x @ x.mT
        product: Tensor | None = None
        for step in range(first, min(first + at_once, num_steps)):
            poly = add_product(gram, gram, gram, beta=b, alpha=c)  # p, except a I
            if product is not None:
                product = add_product(product, poly, product, beta=a)
            if step + 1 in (first + at_once, num_steps):
                x = add_product(x, poly, x, beta=a) if product is None else product @ x
                break
            if product is None:
                product = poly.clone()
                product.diagonal(dim1=-2, dim2=-1).add_(a)
            half = add_product(gram, poly, gram, beta=a)
            gram = add_product(half, poly, half, beta=a)
    return x.mT if is_tall else x


def steps_at_once(rows: int, columns: int, dtype: torch.dtype) -> int:
    """Returns how many steps of matrices are taken before they are multiplied."""
    small, large = sorted((rows, columns))
    return STEPS_AT_ONCE if large >= 2 * small and dtype != torch.bfloat16 else 1


def newton_schulz_flops(rows: int, columns: int, num_steps: int) -> float:
    """Returns multiply-adds x 2 of one matrix, a step at a time."""
    small, large = sorted((rows, columns))
    return 2.0 * num_steps * small * small * (2 * large + small)


def update_scale(mode: UpdateScale, rows: int, columns: int) -> float:
    """Returns the factor on an orthogonal update of a matrix by its outputs and inputs, before the extra factor."""
    if mode == "spectral":
        return max(rows, columns) ** 0.5
    ratio = rows / columns
    return (max(1.0, ratio) if mode == "shape_scaling" else ratio) ** 0.5


@dataclass(frozen=True)
class Muon(Update):
    """See `Update`.

    Attributes:
        extra_scale: factor in addition to that of `scale`; 0.2 with "spectral" gives updates the root mean square of AdamW's.
        low_precision: whether matrix products are in bfloat16.
        splits_qkv: whether a matrix is a fused [key-value heads, queries per head + 2, D, H] projection, whose queries, keys
            and values are a matrix each.
    """

    momentum: float = 0.95
    nesterov: bool = True
    num_steps: int = 5
    scale: UpdateScale = "spectral"
    extra_scale: float = 0.2
    low_precision: bool = False
    splits_qkv: bool = False
    moments = ("momentum",)
    needs_whole = True

    def accumulate(self, grad: Tensor, moments: Mapping[str, Tensor], step: int) -> Tensor:
        """Returns the momentum, with Nesterov's look ahead."""
        momentum = torch.add(grad, moments["momentum"], alpha=self.momentum, out=moments["momentum"])
        return grad.add(momentum, alpha=self.momentum) if self.nesterov else momentum

    def direction(self, step: Tensor, num_stacked: int) -> Tensor:
        """Returns the scaled orthogonal matrices."""
        found = [self._of_matrices(part.flatten(num_stacked, -2)).view_as(part) for part in self.parts(step)]
        return torch.cat(found, -3) if self.splits_qkv else found[0]

    def parts(self, tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns what is a matrix each: of fused projections queries, keys and values, else the tensors themselves."""
        if not self.splits_qkv:
            return (tensors,)
        return tensors[..., :-2, :, :], tensors[..., -2:-1, :, :], tensors[..., -1:, :, :]

    def _of_matrices(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[-2:]
        factor = self.extra_scale * update_scale(self.scale, rows, columns)
        if (
            not self.low_precision
            and rows * columns <= COMPILED_ELEMENTS
            and x.dtype == torch.float32
            and extension.serves(x)
        ):
            matrices = x.reshape(-1, rows, columns)
            result = torch.empty_like(matrices)
            steps = (self.num_steps, steps_at_once(rows, columns, x.dtype), *COEFFICIENTS, EPSILON, factor)
            torch.ops.megatron_samoe.newton_schulz(matrices.contiguous(), *steps, result)
            return result.view(x.shape)
        cached = CACHED_ELEMENTS * torch.get_num_threads() if x.device.type == "cpu" else x.numel()
        result = torch.empty_like(x)
        at_once = max(cached // x.shape[1:].numel(), 1)
        for some, out in zip(x.split(at_once), result.split(at_once), strict=True):
            inner = some.bfloat16() if self.low_precision else some
            found = newton_schulz(inner if len(inner) > 1 else inner.squeeze(0), self.num_steps)
            torch.mul(found.to(x.dtype), factor, out=out.view(found.shape))
        return result


def muon_of(config: OptimizerConfig, splits_qkv: bool = False) -> Muon:
    """Returns the configured Muon.

    Args:
        splits_qkv: whether it is for fused projections of queries, keys and values.
    """
    return Muon(
        config.muon_momentum,
        config.muon_use_nesterov,
        config.muon_num_ns_steps,
        config.muon_scale_mode,
        config.muon_extra_scale_factor,
        config.muon_ns_dtype == "bf16",
        splits_qkv and config.muon_split_qkv,
    )
