"""Linear layers and embeddings split over tensor-parallel ranks, and parameters that carry a tag.

Between embedding and loss, hidden states are flat: [T, H] with T = B * S tokens.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_samoe.ops.attention import soft_capped
from megatron_samoe.parallel_state.parameter_tag import Init, ParameterTag, set_tag
from megatron_samoe.parallel_state.shard_spec import ShardSpec
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.tensor_parallel.mappings import enter_tensor_parallel_region, leave_tensor_parallel_region


def new_parameter(
    global_shape: tuple[int, ...], tag: ParameterTag, state: ParallelState, dtype: torch.dtype
) -> nn.Parameter:
    """Returns an uninitialised parameter with this rank's shard of a global shape, and its tag."""
    shape = list(global_shape)
    for dim, axis in tag.shard.partition:
        size = state.group(axis).size
        assert shape[dim] % size == 0, f"dim {dim} of {global_shape} does not divide over {axis} = {size}"
        shape[dim] //= size
    return set_tag(nn.Parameter(torch.empty(shape, dtype=dtype, device=state.device)), tag)


def token_wise_spec(state: ParallelState) -> ShardSpec:
    """Returns the spec of weights that act on each token separately. With sequence parallelism each tensor-parallel rank has
    only its tokens' part of their gradient.
    """
    return ShardSpec(partial=("tp",) if state.sequence_parallel else ())


class ColumnParallelLinear(nn.Module):
    """A linear layer y = x W^T + b with W's output dims split over tensor-parallel ranks; y stays split.

    Args:
        out_dims: global output dims, flattened in the result; the weight is [*out_dims, in_features].
        partition_dim: the output dim that is split.
    """

    def __init__(
        self,
        in_features: int,
        out_dims: tuple[int, ...],
        partition_dim: int,
        *,
        bias: bool,
        init: Init,
        state: ParallelState,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.state = state
        spec = ShardSpec(partition=((partition_dim, "tp"),))
        self.weight = new_parameter((*out_dims, in_features), ParameterTag(spec, init), state, dtype)
        self.bias = new_parameter(out_dims, ParameterTag(spec), state, dtype) if bias else None

    def forward(self, x_TH: Tensor) -> Tensor:
        """Returns [T, local outputs]."""
        x_TH = enter_tensor_parallel_region(x_TH, self.state)
        bias = None if self.bias is None else self.bias.flatten()
        return F.linear(x_TH, self.weight.flatten(0, -2), bias)


class TokenWiseLinear(nn.Module):
    """A linear layer y = x W^T whose weight is the same on every tensor-parallel rank; with sequence parallelism it acts on the rank's
    tokens.
    """

    def __init__(self, in_features: int, out_features: int, *, init: Init, state: ParallelState, dtype: torch.dtype):
        super().__init__()
        self.weight = new_parameter(
            (out_features, in_features), ParameterTag(token_wise_spec(state), init), state, dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns [T, out_features]."""
        return F.linear(x, self.weight)


class RowParallelLinear(nn.Module):
    """A linear layer y = x W^T + b with W's inputs split over tensor-parallel ranks; x is split, y is complete."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, init: Init, state: ParallelState, dtype: torch.dtype
    ):
        super().__init__()
        self.state = state
        spec = ShardSpec(partition=((1, "tp"),))
        self.weight = new_parameter((out_features, in_features), ParameterTag(spec, init), state, dtype)
        self.bias = new_parameter((out_features,), ParameterTag(token_wise_spec(state)), state, dtype) if bias else None

    def forward(self, x_TF: Tensor) -> Tensor:
        """Returns [T, out_features]."""
        if self.state.tp.size == 1:
            return F.linear(x_TF, self.weight, self.bias)
        y_TH = leave_tensor_parallel_region(F.linear(x_TF, self.weight), self.state)
        return y_TH if self.bias is None else y_TH + self.bias


class VocabParallelEmbedding(nn.Module):
    """Token embeddings with rows split over tensor-parallel ranks; also the output matrix where weights are tied.

    Args:
        vocab_size: number of tokens, before padding; rows from there to padded_vocab_size are never used.
        family: "embedding" where the first and the last pipeline stage both hold the weights.
    """

    def __init__(
        self,
        vocab_size: int,
        padded_vocab_size: int,
        hidden_size: int,
        *,
        init: Init,
        state: ParallelState,
        dtype: torch.dtype,
        family: Literal["dense", "embedding"] = "dense",
    ):
        super().__init__()
        self.state = state
        # The first and the last stage each have a part of a tied table's gradient.
        completed_at: Literal["backward", "step_end"] = "step_end" if family == "embedding" else "backward"
        tag = ParameterTag(ShardSpec(family, partition=((0, "tp"),)), init, completed_at)
        self.weight = new_parameter((padded_vocab_size, hidden_size), tag, state, dtype)
        rows = self.weight.shape[0]
        self.first_id = rows * state.tp.rank
        self.num_used_rows = max(0, min(rows, vocab_size - self.first_id))

    def forward(self, ids_T: Tensor) -> Tensor:
        """Returns x_TH, with sequence parallelism this rank's share of tokens."""
        if self.state.tp.size == 1:
            return F.embedding(ids_T, self.weight)
        local_T = ids_T - self.first_id
        mine_T = (local_T >= 0) & (local_T < self.weight.shape[0])
        x_TH = F.embedding(local_T.masked_fill(~mine_T, 0), self.weight) * mine_T[:, None]
        return leave_tensor_parallel_region(x_TH, self.state)

    def logits(self, x_TH: Tensor, softcap: float | None = None) -> Tensor:
        """Returns this rank's logits [T, `width`], soft-capped; those of padding are -inf, so it takes no probability."""
        x_TH = enter_tensor_parallel_region(x_TH, self.state)
        if not self.width:
            return F.linear(x_TH, self.weight[:0])
        logits_TV = soft_capped(F.linear(x_TH, self.weight), softcap)
        return _WithoutPadding.apply(logits_TV, self.num_used_rows) if self.num_used_rows < self.width else logits_TV

    @property
    def width(self) -> int:
        """Columns of this rank's logits: padding included, which keeps the rows of three large products aligned; 0 where it
        has only padding.
        """
        return self.weight.shape[0] if self.num_used_rows else 0


class _WithoutPadding(torch.autograd.Function):
    """Sets the last columns to -inf, in place. A softmax gives them no gradient, so that of all columns stays as it is."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, num_used: int) -> Tensor:  # type: ignore[override]
        logits_TV[:, num_used:] = -torch.inf
        ctx.mark_dirty(logits_TV)
        return logits_TV

    @staticmethod
    def backward(ctx: Any, dlogits_TV: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dlogits_TV, None


def padded_vocab_size(vocab_size: int, divisible_by: int) -> int:
    """Returns the vocabulary size, rounded up to a multiple of `divisible_by`."""
    return math.ceil(vocab_size / divisible_by) * divisible_by
