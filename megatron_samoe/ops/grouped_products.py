"""Products of rows that are sorted by expert where only the device knows how many rows an expert has.

torch's grouped product takes the ends of the experts' rows from the device, in one launch. Where torch has no kernel for
it (`use_grouped_mm`), rows are packed into blocks of one size, each of one expert: R rows of e experts fill at most
R / block + e blocks, so all shapes are known. A block's matrix is copied for it, some blocks at a time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from megatron_samoe.ops.asynchronous import capability, runs_behind_host

#: Elements of matrices that are copied for blocks at a time.
_CHUNK_ELEMENTS = 1 << 25
_LEAST_BLOCK, _MOST_BLOCK = 16, 512
#: torch's grouped product takes fewer experts than this.
_MOST_GROUPS = 1024
#: bf16 elements of the 16 bytes in which it reads and writes memory.
_UNIT = 8


@dataclass(frozen=True)
class Blocks:
    """Rows in blocks.

    Attributes:
        expert_of_block_b: whose rows a block has; blocks without rows count as the last expert's.
        row_of_position: [b, block], row in each position; any row where the position is empty.
        is_filled: [b, block].
        position_of_row_R: position of each row among b * block.
    """

    expert_of_block_b: Tensor
    row_of_position: Tensor
    is_filled: Tensor
    position_of_row_R: Tensor


class ExpertRows:
    """How many of R rows each of e experts has, on a device that works asynchronously.

    Args:
        counts_e: rows of each expert; rows after these count as the last expert's, and have no gradient.
        ends_e: where each expert's rows end, int32, with those after the counted ones; computed if not given.
    """

    def __init__(self, counts_e: Tensor, num_rows: int, ends_e: Tensor | None = None):
        self.num_rows, self.num_experts, self._counts_e = num_rows, len(counts_e), counts_e
        if ends_e is None:
            ends_e = counts_e.cumsum(0, dtype=torch.int32)
            ends_e[-1:] = num_rows
        self.ends_e = ends_e

    @functools.cached_property
    def has_none_e(self) -> Tensor:
        """Whether an expert has no row with a gradient."""
        return self._counts_e == 0

    @functools.cached_property
    def expert_of_row_R(self) -> Tensor:
        """The expert of each row."""
        return torch.searchsorted(self.ends_e, self._range(self.num_rows), right=True)

    @functools.cached_property
    def counts_e(self) -> Tensor:
        """Rows of each expert, those after the counted ones included."""
        return self.ends_e.diff(prepend=self.ends_e.new_zeros(1))

    @functools.cached_property
    def blocks(self) -> Blocks:
        """The rows in blocks."""
        block = min(max(-(-self.num_rows // (2 * self.num_experts)), _LEAST_BLOCK), _MOST_BLOCK)
        num_blocks = self.num_rows // block + self.num_experts
        counts_e, ends_e = self.counts_e, self.ends_e
        blocks_e = counts_e.add(block - 1).div(block, rounding_mode="floor")
        block_ends_e = blocks_e.cumsum(0, dtype=torch.int32)
        expert_b = torch.searchsorted(block_ends_e, self._range(num_blocks), right=True).clamp_max(self.num_experts - 1)
        first_row_e, first_block_e = ends_e - counts_e, block_ends_e - blocks_e
        rank_b = self._range(num_blocks) - first_block_e[expert_b]
        row_of_position = (first_row_e[expert_b] + rank_b * block)[:, None] + self._range(block)
        is_filled = row_of_position < ends_e[expert_b][:, None]
        position_R = self._range(self.num_rows) + (first_block_e * block - first_row_e)[self.expert_of_row_R]
        return Blocks(expert_b, row_of_position.clamp_max_(self.num_rows - 1), is_filled, position_R)

    def _range(self, size: int) -> Tensor:
        return torch.arange(size, dtype=torch.int32, device=self.ends_e.device)


def use_grouped_mm(left: Tensor, right: Tensor, num_groups: int) -> bool:
    """Returns whether torch has a grouped product for these operands, [M, K] and [K, N] or [groups, K, N]: bf16 on a GPU of
    capability 9 or 10, either way round in memory, with everything in multiples of 16 bytes.

    For all else torch's grouped product copies the experts' ends to the host and loops.
    """
    if has_torch_function((left, right)):  # the planner's recorder takes the one product for granted
        return handle_torch_function(use_grouped_mm, (left, right), left, right, num_groups)
    return (
        runs_behind_host(left.device)
        and num_groups < _MOST_GROUPS
        and right.shape[-1] % _UNIT == 0  # or rows of the result would not be contiguous
        and _fits_grouped_mm(left)
        and _fits_grouped_mm(right)
        and capability(left.device)[0] in (9, 10)
    )


def _fits_grouped_mm(t: Tensor) -> bool:
    """Returns whether torch takes an operand as it is in memory: rows or columns are contiguous, and each begins at a multiple of
    16 bytes, as all memory of torch's allocators does.

    torch.compile cannot follow an offset; there torch itself refuses a wrong one.
    """
    *outer, height_stride, width_stride = t.stride()
    height, width = t.shape[-2:]
    if height_stride == 1 and width_stride >= max(height, 1):
        pitch = width_stride
    elif width_stride == 1 and height_stride >= max(width, 1):
        pitch = height_stride
    else:
        return False
    starts = (pitch, *outer) if torch.compiler.is_compiling() else (pitch, *outer, t.storage_offset())
    return t.dtype == torch.bfloat16 and all(start % _UNIT == 0 for start in starts)


def _leaves_empty_experts_unset(device: torch.device) -> bool:
    """Returns whether torch's grouped product was reported to leave gradients of experts without rows as memory had them:
    on capability 10, and not on 9 (pytorch/pytorch#172439). Filling them costs a pass over all gradients.
    """
    return capability(device)[0] > 9


def products(x_RK: Tensor, rows: ExpertRows, w_eMK: Tensor, b_eM: Tensor | None) -> Tensor:
    """Returns [R, M]: expert e's rows times w[e] transposed, plus b[e]."""
    if not rows.num_rows:
        return x_RK.new_empty(0, w_eMK.shape[1])
    w_eKM = w_eMK.transpose(1, 2)
    if use_grouped_mm(x_RK, w_eKM, rows.num_experts):
        y_RM = F.grouped_mm(x_RK, w_eKM, offs=rows.ends_e)
    else:
        y_RM = _by_blocks(x_RK, rows.blocks, w_eMK)
    return y_RM if b_eM is None else y_RM + b_eM.index_select(0, rows.expert_of_row_R)


def add_outer_products(grad_eMK: Tensor, d_RM: Tensor, x_RK: Tensor, rows: ExpertRows) -> None:
    """Adds d_e^T x_e to grad[e] for each expert's rows."""
    if not rows.num_rows:
        return
    d_MR = d_RM.t()
    if use_grouped_mm(d_MR, x_RK, rows.num_experts):
        product_eMK = F.grouped_mm(d_MR, x_RK, offs=rows.ends_e)
        if _leaves_empty_experts_unset(product_eMK.device):
            product_eMK.masked_fill_(rows.has_none_e[:, None, None], 0.0)
        grad_eMK += product_eMK
        return
    blocks = rows.blocks
    d_blocks, x_blocks = _packed(d_RM, blocks), _packed(x_RK, blocks)
    for part in _chunks(len(d_blocks), d_RM.shape[1] * x_RK.shape[1]):
        product = torch.bmm(d_blocks[part].transpose(1, 2), x_blocks[part]).to(grad_eMK.dtype)
        # Unlike index_add's, its sums have one order.
        grad_eMK.index_put_((blocks.expert_of_block_b[part],), product, accumulate=True)


def add_column_sums(grad_eM: Tensor, d_RM: Tensor, rows: ExpertRows) -> None:
    """Adds the sum of each expert's rows of d to grad[e]."""
    if rows.num_rows:
        lengths_e = rows.counts_e.to(torch.int64)
        grad_eM += torch.segment_reduce(d_RM.to(grad_eM.dtype), "sum", lengths=lengths_e, unsafe=True, initial=0.0)


def _by_blocks(x_RK: Tensor, blocks: Blocks, w_eMK: Tensor) -> Tensor:
    x_blocks = _packed(x_RK, blocks)
    y_blocks = x_RK.new_empty(*x_blocks.shape[:2], w_eMK.shape[1])
    for part in _chunks(len(x_blocks), w_eMK.shape[1] * w_eMK.shape[2]):
        w_b = w_eMK.index_select(0, blocks.expert_of_block_b[part])
        torch.bmm(x_blocks[part], w_b.transpose(1, 2), out=y_blocks[part])
    return y_blocks.flatten(0, 1).index_select(0, blocks.position_of_row_R)


def _packed(x_RK: Tensor, blocks: Blocks) -> Tensor:
    """Returns [b, block, K], with zeros in empty positions."""
    packed = x_RK.index_select(0, blocks.row_of_position.flatten()).view(*blocks.row_of_position.shape, -1)
    return packed.masked_fill_(~blocks.is_filled[:, :, None], 0.0)


def _chunks(num_blocks: int, matrix_elements: int) -> list[slice]:
    size = max(_CHUNK_ELEMENTS // max(matrix_elements, 1), 1)
    return [slice(first, first + size) for first in range(0, num_blocks, size)]
