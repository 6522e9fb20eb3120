"""Inner products of tensors that are not in memory together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_samoe.moe.sharing.coefficients import ROW_OF_WEIGHT

#: Elements per row that are widened to fp64 at a time.
COLUMNS = 1 << 16


def add_inner_products(gram_XY: Tensor, a_XN: Tensor, b_YN: Tensor) -> None:
    """Adds a b^T to an fp64 matrix, widening a run of columns at a time."""
    for start in range(0, a_XN.shape[1], COLUMNS):
        part = slice(start, start + COLUMNS)
        gram_XY += a_XN[:, part].double() @ b_YN[:, part].double().T


def inner_products(read: Callable[[int], Tensor], num_layers: int, num_experts: int) -> Tensor:
    """Returns gram_LELE of [E, n] blocks in fp64; `read` gives a layer's, and two are in memory at a time."""
    gram = torch.zeros(num_layers, num_experts, num_layers, num_experts, dtype=torch.float64)
    for a in range(num_layers):
        rows = read(a)
        for b in range(a, num_layers):
            add_inner_products(gram[a, :, b], rows, rows if a == b else read(b))
            if a != b:
                gram[b, :, a] = gram[a, :, b].T
    return gram


def gram_of_row(
    read: Callable[[str, int], Tensor], kinds: Sequence[str], row: int, num_layers: int, num_experts: int
) -> Tensor:
    """Returns inner products over the tensors that share a row of coefficients; `read` gives [E, n] of a kind and layer."""
    chosen = [kind for kind in kinds if ROW_OF_WEIGHT[kind] == row]
    return torch.stack([inner_products(partial(read, kind), num_layers, num_experts) for kind in chosen]).sum(0)


def bank_inner_products(bank_PGN: Tensor) -> Tensor:
    """Returns gram_GPP of one tensor of all banks in fp64."""
    num_banks, groups, _ = bank_PGN.shape
    gram = torch.zeros(groups, num_banks, num_banks, dtype=torch.float64)
    for g in range(groups):
        add_inner_products(gram[g], bank_PGN[:, g], bank_PGN[:, g])
    return gram
