"""Update algorithms other than AdamW, one for each group of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_samoe.distributed.grad_buffer import Piece
from megatron_samoe.parallel_state.parameter_tag import ParameterTag
from megatron_samoe.parallel_state.shard_spec import FlatSlice, ShardSpec
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.row_exchange.all_to_all import all_to_all_rows


class Update(Protocol):
    """An update algorithm: master -= lr * (direction(accumulate(gradient)) + weight_decay * master).

    Attributes:
        moments: names of the state of each element; checkpoints carry it.
        needs_whole: whether `direction` needs whole tensors, gathered over ZeRO-1 and tensor-parallel shards.
    """

    moments: Sequence[str]
    needs_whole: bool

    def accumulate(self, grad: Tensor, moments: Mapping[str, Tensor], step: int) -> Tensor:
        """Adds the gradient of the elements that this rank updates to the moments, and returns their step before
        `direction`. All have the shape of the elements.

        Args:
            grad: fp32, clipped; read-only.
            moments: by name; updated in place.
            step: number of the step, 1 for the first.
        """

    def direction(self, step: Tensor, num_stacked: int) -> Tensor:
        """Returns the direction of the update; lr * direction is subtracted from the master weights.

        Args:
            step: result of `accumulate`: the whole tensor with `needs_whole`, else this rank's elements. The result has
                its shape.
            num_stacked: number of leading dims of a whole tensor that only count its matrices (banks, this rank's
                experts).
        """


def gather_shard(own: Tensor | None, held: FlatSlice | None, tag: ParameterTag, shape: tuple[int, ...],
                 state: ParallelState, like: Tensor) -> Tensor:  # fmt: skip
    """Returns a rank's shard of a tensor, gathered from the elements that ranks with the same shard hold; they call it
    together.

    Args:
        own: this rank's elements; None where it holds none.
        held: their place in the shard; None where they are all of it.
        shape: of the shard.
        like: a tensor with the dtype and device of the result.
    """
    if own is not None and held is None:
        return own.view(shape)
    shard = like.new_zeros(shape)
    if own is not None and held is not None:
        _slice_of(shard, held).copy_(own)
    return state.group(tag.gradient_group).all_reduce(shard)


def gather_whole(own: Tensor | None, held: FlatSlice | None, tag: ParameterTag, shape: tuple[int, ...],
                 state: ParallelState, like: Tensor) -> Tensor:  # fmt: skip
    """Returns a whole tensor, gathered over its shards as well; arguments are those of `gather_shard`."""
    shard = gather_shard(own, held, tag, shape, state, like)
    for dim, axis in _split_dims(tag).partition:
        parts = state.group(axis).all_gather(shard.movedim(dim, 0).contiguous())
        shard = parts.movedim(0, dim)
    return shard


def own_elements(whole: Tensor, piece: Piece, state: ParallelState) -> Tensor:
    """Returns the elements of a whole tensor that this rank updates."""
    shard = _split_dims(piece.tag).local_slice(whole, state)
    return shard if piece.slice is None else _slice_of(shard, piece.slice)


def _slice_of(shard: Tensor, held: FlatSlice) -> Tensor:
    """Returns the elements of a shard that a slice holds, as a view of a contiguous shard."""
    leading = len(held.whole_shape)
    return shard.reshape(*shard.shape[:leading], -1)[..., held.start : held.stop]


@torch.no_grad()
def reorder_experts(
    tensors: Sequence[Tensor | None], held: FlatSlice | None, tag: ParameterTag, shape: tuple[int, ...], dim: int,
    order_E: Tensor, state: ParallelState, like: Tensor,
) -> None:  # fmt: skip
    """Gives the experts of a parameter, and of its moments, other places. Ranks call it together.

    Args:
        tensors: this rank's elements of each, which are changed; None where it holds none. The rest is as in
            `gather_shard`.
        dim: of the experts, split over expert-parallel ranks or whole.
        order_E: which expert each place is to have, among those of all ranks.
    """
    is_split = any(axis == "ep" for _, axis in tag.shard.partition)
    size, own_rank = (state.ep.size, state.ep.rank) if is_split else (1, 0)
    e = shape[dim]
    wanted = [[divmod(int(expert), e) for expert in part] for part in order_E.view(size, e).tolist()]
    sent = [place for part in wanted for rank, place in part if rank == own_rank]
    send_rows = [sum(rank == own_rank for rank, _ in part) for part in wanted]
    receive_rows = [sum(rank == sender for rank, _ in wanted[own_rank]) for sender in range(size)]
    arriving = sorted(range(e), key=lambda place: wanted[own_rank][place][0])  # by sender, as rows come
    for own in tensors:
        shard = gather_shard(own, held, tag, shape, state, like).movedim(dim, 0)
        rows = shard.reshape(e, -1)[torch.tensor(sent, dtype=torch.int64, device=shard.device)]
        if is_split:
            rows = all_to_all_rows(rows, send_rows, receive_rows, state.ep)
        if own is not None:
            moved = torch.empty_like(rows)
            moved[torch.tensor(arriving, device=rows.device)] = rows
            whole = moved.view(shard.shape).movedim(0, dim).contiguous()
            own.copy_((whole if held is None else _slice_of(whole, held)).view(own.shape))


def _split_dims(tag: ParameterTag) -> ShardSpec:
    """Returns the sharding of the matrices alone: a rank's experts and banks stay its own."""
    matrices = tuple((dim, axis) for dim, axis in tag.shard.partition if dim >= tag.init.num_indexed_dims)
    return ShardSpec(tag.shard.family, partition=matrices)


@torch.no_grad()
def apply_update(
    update: Update, named: Mapping[str, tuple[ParameterTag, tuple[int, ...]]], pieces: Mapping[str, Piece],
    masters: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]], rates: tuple[float, float, float],
    step: int, state: ParallelState, like: Tensor,
) -> None:  # fmt: skip
    """Updates the master weights of a group's parameters. Ranks call it together, also those that hold no element of
    some tensor.

    Args:
        named: tag and shape of this rank's shard of every parameter of the group, in the same order on all ranks.
        rates: learning rate, weight decay, factor on the gradients.
    """
    lr, weight_decay, grad_scale = rates
    for name, (tag, shape) in named.items():
        piece, step_by = pieces.get(name), None
        if piece is not None:
            step_by = update.accumulate(piece.grad.to(masters[name].dtype) * grad_scale, moments[name], step)
        if update.needs_whole:
            held = None if piece is None else piece.slice
            whole = gather_whole(step_by, held, tag, shape, state, like)
            whole = update.direction(whole, tag.init.num_indexed_dims)
            step_by = None if piece is None else own_elements(whole, piece, state)
        elif step_by is not None:
            step_by = update.direction(step_by, 0)
        if piece is not None and step_by is not None:
            master = masters[name]
            master.mul_(1.0 - lr * weight_decay).sub_(step_by.reshape(master.shape), alpha=lr)
