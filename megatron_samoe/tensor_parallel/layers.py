"""Linear layers and embeddings split over tensor-parallel ranks, and the making of tagged parameters.

Hidden states are flat, [T, H] with T = B * S tokens, everywhere between embedding and loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_samoe.parallel_state.shard_spec import ShardSpec, set_shard_spec
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.tensor_parallel.mappings import enter_tensor_parallel_region, leave_tensor_parallel_region


@dataclass(frozen=True)
class Init:
    """How a parameter begins; `initialize_parameters` applies it when the parameter's global name is known.

    Attributes:
        std: of a normal distribution; only with kind "normal".
        mean: of the same; a number, or this rank's part as a tensor.
        num_indexed_dims: leading dims whose every index has a seed of its own, so that a rank makes only the experts
            it holds.
    """

    kind: Literal["normal", "zeros", "ones"] = "normal"
    std: float = 0.0
    mean: float | Tensor = 0.0
    num_indexed_dims: int = 0


ZEROS, ONES = Init("zeros"), Init("ones")


def new_parameter(
    global_shape: tuple[int, ...], spec: ShardSpec, init: Init, state: ParallelState, dtype: torch.dtype
) -> nn.Parameter:
    """Returns an uninitialised parameter with this rank's part of a global shape, tagged with its spec and init."""
    shape = list(global_shape)
    for dim, axis in spec.partition:
        size = state.group(axis).size
        assert shape[dim] % size == 0, f"dim {dim} of {global_shape} does not divide over {axis} = {size}"
        shape[dim] //= size
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=state.device))
    parameter.init = init  # type: ignore[attr-defined]
    return set_shard_spec(parameter, spec)


def token_wise_spec(state: ParallelState) -> ShardSpec:
    """Returns the spec of weights that act on each token alike: with sequence parallelism each tensor-parallel rank has
    only its tokens' part of the gradient."""
    return ShardSpec(partial=("tp",) if state.sequence_parallel else ())


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with W's output dims split over tensor-parallel ranks; y stays split.

    Args:
        out_dims: global output dims, flattened in the result; the weight is [*out_dims, in_features].
        partition_dim: the output dim that is split.
    """

    def __init__(
        self, in_features: int, out_dims: tuple[int, ...], partition_dim: int, *, bias: bool, init: Init,
        state: ParallelState, dtype: torch.dtype,
    ):  # fmt: skip
        super().__init__()
        self.state = state
        spec = ShardSpec(partition=((partition_dim, "tp"),))
        self.weight = new_parameter((*out_dims, in_features), spec, init, state, dtype)
        self.bias = new_parameter(out_dims, spec, ZEROS, state, dtype) if bias else None

    def forward(self, x_TH: Tensor) -> Tensor:
        """Returns [T, local outputs]."""
        x_TH = enter_tensor_parallel_region(x_TH, self.state)
        bias = None if self.bias is None else self.bias.flatten()
        return F.linear(x_TH, self.weight.flatten(0, -2), bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with W's inputs split over tensor-parallel ranks; x is split, y is whole."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, init: Init, state: ParallelState, dtype: torch.dtype
    ):
        super().__init__()
        self.state = state
        spec = ShardSpec(partition=((1, "tp"),))
        self.weight = new_parameter((out_features, in_features), spec, init, state, dtype)
        self.bias = new_parameter((out_features,), token_wise_spec(state), ZEROS, state, dtype) if bias else None

    def forward(self, x_TF: Tensor) -> Tensor:
        """Returns [T, out_features]."""
        if self.state.tp.size == 1:
            return F.linear(x_TF, self.weight, self.bias)
        y_TH = leave_tensor_parallel_region(F.linear(x_TF, self.weight), self.state)
        return y_TH if self.bias is None else y_TH + self.bias


class VocabParallelEmbedding(nn.Module):
    """Token embeddings with rows split over tensor-parallel ranks; also the output matrix where weights are tied.

    Args:
        vocab_size: tokens that exist; rows from there to padded_vocab_size are never used.
        family: "embedding" where the first and the last pipeline stage both hold the weights.
    """

    def __init__(
        self, vocab_size: int, padded_vocab_size: int, hidden_size: int, *, init: Init, state: ParallelState,
        dtype: torch.dtype, family: Literal["dense", "embedding"] = "dense",
    ):  # fmt: skip
        super().__init__()
        self.state = state
        spec = ShardSpec(family, partition=((0, "tp"),))
        self.weight = new_parameter((padded_vocab_size, hidden_size), spec, init, state, dtype)
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

    def logits(self, x_TH: Tensor) -> Tensor:
        """Returns this rank's logits [T, num_used_rows]: no column for padding, so it takes no probability."""
        x_TH = enter_tensor_parallel_region(x_TH, self.state)
        return F.linear(x_TH, self.weight[: self.num_used_rows])


def padded_vocab_size(vocab_size: int, divisible_by: int) -> int:
    """Returns the vocabulary rounded up."""
    return math.ceil(vocab_size / divisible_by) * divisible_by
