"""Main gradients in flat fp32 buffers, one or more for each group of ranks that sums gradients.

With a distributed optimizer (ZeRO-1, arXiv:1910.02054) each rank of the group updates a shard of the buffer. Gradients
are reduced and scattered. Weights then lie in one flat tensor too, and are gathered after the update.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_samoe.parallel_state.parameter_tag import ParameterTag, tag_of
from megatron_samoe.parallel_state.shard_spec import FlatSlice, is_counted_here
from megatron_samoe.parallel_state.state import Group, ParallelState

DEFAULT_BUCKET_SIZE = 40_000_000


def _keep_gradient(arrived: weakref.WeakMethod[Callable[[str], None]], name: str, parameter: Tensor) -> None:
    """Adds a parameter's gradient to its buffer; autograd calls this once per backward pass, when the gradient is
    complete.

    A parameter must not hold its buffer. It would keep the group and gloo's threads until the interpreter ends, and a
    thread that then wants the interpreter's lock aborts the process.
    """
    if parameter.grad is not None:  # else an op has added to the main gradient itself
        parameter.main_grad += parameter.grad  # type: ignore[attr-defined]
        parameter.grad = None
    tell_buffer = arrived()
    if tell_buffer is not None:
        tell_buffer(name)


@dataclass(frozen=True)
class Piece:
    """The part of one parameter that this rank updates: its full shard, or a slice of it.

    Attributes:
        slice: the elements of the shard; None for the full shard, in its shape.
        weight, grad: the elements, as views.
        counts: whether this rank counts the elements in norms and writes them to checkpoints.
    """

    name: str
    tag: ParameterTag
    slice: FlatSlice | None
    weight: Tensor
    grad: Tensor
    counts: bool


class GradBuffer:
    """One tensor with the gradients of parameters that are summed over the same ranks.

    Each parameter gets `main_grad`, a view into the buffer. Autograd's `grad` is added to it as soon as it is complete,
    and freed. Ops that know main gradients (experts) add to them directly.

    Args:
        group: ranks that sum the gradients; None for parameters that are slices already, whose gradients arrive summed.
        is_sharded: whether each of the group's ranks updates a shard of the buffer.
        overlap: whether the reduction starts as soon as the last micro-batch's gradients are there.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], group: Group | None, is_sharded: bool, overlap: bool = False
    ):
        self.parameters, self.group = dict(parameters), group
        self.overlap = overlap and group is not None and group.size > 1
        self._arrivals: dict[str, int] = {}
        self._num_micro_batches = 0
        self._starts_early = self.overlap
        self._started: tuple[dist.Work | None, Tensor | None] | None = None
        self.is_sharded = is_sharded and group is not None and group.size > 1
        first = next(iter(parameters.values()))
        self.numel = sum(p.numel() for p in parameters.values())
        size = group.size if self.is_sharded and group is not None else 1
        self.shard_size = -(-self.numel // size)
        grad_dtype = torch.promote_types(first.dtype, torch.float32)
        self.flat = torch.zeros(self.shard_size * size, dtype=grad_dtype, device=first.device)
        self.weights = (
            torch.zeros(self.shard_size * size, dtype=first.dtype, device=first.device) if self.is_sharded else None
        )
        self.starts: dict[str, int] = {}
        start = 0
        for name, p in parameters.items():
            self.starts[name] = start
            stop = start + p.numel()
            p.main_grad = self.flat[start:stop].view(p.shape)  # type: ignore[attr-defined]
            if self.weights is not None:
                home = self.weights[start:stop].view(p.shape)
                home.copy_(p.detach())
                p.data = home
            p.register_post_accumulate_grad_hook(partial(_keep_gradient, weakref.WeakMethod(self._arrived), name))
            start = stop

    def zero(self, num_micro_batches: int, overlap: bool = True) -> None:
        """Clears the gradients for a step of `num_micro_batches`; without overlap only `reduce` reduces them."""
        assert self._started is None
        self.flat.zero_()
        self._num_micro_batches = num_micro_batches
        self._starts_early = self.overlap and overlap
        self._arrivals = dict.fromkeys(self.parameters, 0)

    def _arrived(self, name: str) -> None:
        """Counts a parameter's complete gradient, and starts the reduction when the last is there."""
        if not self._starts_early:
            return
        self._arrivals[name] += 1
        if all(count == self._num_micro_batches for count in self._arrivals.values()):
            self._start()

    def _start(self) -> None:
        assert self.group is not None and self._started is None
        if self.is_sharded:
            part = torch.empty_like(self.own(self.flat))
            self._started = self.group.start_reduce_scatter(part, self.flat), part
        else:
            self._started = self.group.start_all_reduce(self.flat), None

    def reduce(self) -> None:
        """Sums the buffer over its group; of a sharded buffer only this rank's shard."""
        if self.group is None:
            return
        if self._started is None:
            self._start()
        assert self._started is not None
        work, part = self._started
        self._started = None
        if work is not None:
            self.group.wait(work)
        if part is not None:
            self.own(self.flat).copy_(part)

    def gather_weights(self) -> None:
        """Gathers the shards of weights that other ranks have updated."""
        if self.weights is not None and self.group is not None:
            self.group.all_gather(self.own(self.weights).clone(), self.weights)

    def own(self, flat: Tensor) -> Tensor:
        """Returns this rank's shard of a flat tensor of the buffer's size, as a view."""
        if not self.is_sharded or self.group is None:
            return flat
        return flat[self.shard_size * self.group.rank : self.shard_size * (self.group.rank + 1)]

    def pieces(self, state: ParallelState) -> list[Piece]:
        """Returns the pieces that this rank updates, in the buffer's order."""
        pieces = []
        for name, p in self.parameters.items():
            tag = tag_of(p)
            counts = is_counted_here(tag.shard, state, is_sliced=tag.slice is not None or self.is_sharded)
            if self.weights is None:
                pieces.append(Piece(name, tag, tag.slice, p.detach(), p.main_grad, counts))  # type: ignore[attr-defined]
                continue
            assert self.group is not None
            start, stop = self.starts[name], self.starts[name] + p.numel()
            low = max(start, self.shard_size * self.group.rank)
            high = min(stop, self.shard_size * (self.group.rank + 1))
            if low < high:
                held = FlatSlice(tuple(p.shape), low - start, high - start)
                pieces.append(Piece(name, tag, held, self.weights[low:high], self.flat[low:high], counts))
        return pieces


class GradBuffers:
    """All main gradients of a rank's model.

    Args:
        parameters: parameters by global name; those without requires_grad are left out.
        is_sharded: whether each rank updates a shard of each buffer (ZeRO-1).
        overlap: reduce buffers while the last backward passes run, where their gradients are complete then.
        bucket_size: elements of a buffer after which the next parameter starts a new one.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        state: ParallelState,
        is_sharded: bool = False,
        overlap: bool = False,
        bucket_size: int | None = None,
    ):
        self.buffers = [
            GradBuffer(
                members,
                None if bucket.group is None else state.group(bucket.group),
                is_sharded,
                overlap=overlap and bucket.completed_at == "backward",
            )
            for bucket, members in _buckets(parameters, bucket_size or DEFAULT_BUCKET_SIZE)
        ]
        self.parameters = {name: p for buffer in self.buffers for name, p in buffer.parameters.items()}
        self.pieces = [piece for buffer in self.buffers for piece in buffer.pieces(state)]

    def zero(self, num_micro_batches: int = 1, overlap: bool = True) -> None:
        """Clears all gradients for a step of `num_micro_batches`.

        Args:
            overlap: whether buffers are reduced early where they may be; else all hold this rank's gradients until
                `reduce`.
        """
        for buffer in self.buffers:
            buffer.zero(num_micro_batches, overlap)

    def reduce(self) -> None:
        """Sums each buffer over its group. Losses are divided by global token counts, so no averaging follows."""
        for buffer in self.buffers:
            buffer.reduce()

    def scale(self, factor: float) -> None:
        """Multiplies the gradients that this rank updates weights with."""
        for buffer in self.buffers:
            buffer.own(buffer.flat).mul_(factor)

    def gather_weights(self) -> None:
        """Gathers the weights that other ranks have updated."""
        for buffer in self.buffers:
            buffer.gather_weights()


@dataclass(frozen=True)
class _Bucket:
    """The key of a buffer's parameters: who sums their gradients, when these are complete, and the dtype."""

    group: str | None
    completed_at: str
    dtype: torch.dtype


def _buckets(parameters: Mapping[str, nn.Parameter], bucket_size: int) -> list[tuple[_Bucket, dict[str, nn.Parameter]]]:
    """Returns the parameters of each buffer, in the model's order."""
    open_buckets: dict[_Bucket, dict[str, nn.Parameter]] = {}
    buckets = []
    for name, p in parameters.items():
        if not p.requires_grad:
            continue
        tag = tag_of(p)
        key = _Bucket(None if tag.slice is not None else tag.gradient_group, tag.completed_at, p.dtype)
        members = open_buckets.get(key)
        if members is None or sum(m.numel() for m in members.values()) >= bucket_size:
            members = open_buckets[key] = {}
            buckets.append((key, members))
        members[name] = p
    return buckets
