"""The reordering of experts, with everything that the optimizer keeps of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_samoe.parallel_state.parameter_tag import ParameterTag
from megatron_samoe.parallel_state.shard_spec import FlatSlice
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.row_exchange.all_to_all import all_to_all_rows


@torch.no_grad()
def reorder_experts(
    tensors: Sequence[Tensor | None],
    held: FlatSlice | None,
    tag: ParameterTag,
    shape: tuple[int, ...],
    dim: int,
    order_E: Tensor,
    state: ParallelState,
    like: Tensor,
) -> None:
    """Reorders the experts of a parameter and of its moments. Ranks call it together.

    Args:
        tensors: this rank's elements of each, which are changed; None where it holds none. The rest is as in
            `_gather_shard`.
        dim: of the experts, split over expert-parallel ranks or not.
        order_E: the expert that each index is to have, among those of all ranks.
    """
    is_split = any(axis == "ep" for _, axis in tag.shard.partition)
    size, own_rank = (state.ep.size, state.ep.rank) if is_split else (1, 0)
    e = shape[dim]
    wanted = [[divmod(int(expert), e) for expert in part] for part in order_E.view(size, e).tolist()]
    sent = [index for part in wanted for rank, index in part if rank == own_rank]
    send_rows = [sum(rank == own_rank for rank, _ in part) for part in wanted]
    receive_rows = [sum(rank == sender for rank, _ in wanted[own_rank]) for sender in range(size)]
    arriving = sorted(range(e), key=lambda row: wanted[own_rank][row][0])  # by sender, as rows come
    for own in tensors:
        shard = _gather_shard(own, held, tag, shape, state, like).movedim(dim, 0)
        rows = shard.reshape(e, -1)[torch.tensor(sent, dtype=torch.int64, device=shard.device)]
        if is_split:
            rows = all_to_all_rows(rows, send_rows, receive_rows, state.ep)
        if own is not None:
            moved = torch.empty_like(rows)
            moved[torch.tensor(arriving, device=rows.device)] = rows
            full = moved.view(shard.shape).movedim(0, dim).contiguous()
            own.copy_((full if held is None else _slice_of(full, held)).view(own.shape))


def _gather_shard(
    own: Tensor | None,
    held: FlatSlice | None,
    tag: ParameterTag,
    shape: tuple[int, ...],
    state: ParallelState,
    like: Tensor,
) -> Tensor:
    """Returns a rank's shard of a tensor, gathered from the elements that ranks with the same shard hold; they call it
    together.

    Args:
        own: this rank's elements; None where it holds none.
        held: their range in the shard; None where they are all of it.
        shape: of the shard.
        like: a tensor with the dtype and device of the result.
    """
    if own is not None and held is None:
        return own.view(shape)
    shard = like.new_zeros(shape)
    if own is not None and held is not None:
        _slice_of(shard, held).copy_(own)
    return state.group(tag.gradient_group).all_reduce(shard)


def _slice_of(shard: Tensor, held: FlatSlice) -> Tensor:
    """Returns the elements of a shard that a slice holds, as a view of a contiguous shard."""
    leading = len(held.leading_shape)
    return shard.reshape(*shard.shape[:leading], -1)[..., held.start : held.stop]
