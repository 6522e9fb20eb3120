"""Tensors go to owners whole, whichever elements ranks hold of them, and their directions come back to these elements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_samoe.config import ParallelConfig
from megatron_samoe.distributed.grad_buffer import Piece
from megatron_samoe.optimizer.whole_tensors import Shard, WholeTensors, even_sizes
from megatron_samoe.parallel_state import ParameterTag, initialize_model_parallel
from megatron_samoe.parallel_state.parameter_tag import Init
from megatron_samoe.parallel_state.shard_spec import FlatSlice
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.distributed

#: Stacks [banks, experts, rows, columns] of one shape, of another, and single matrices.
SHAPES = {"a": (2, 3, 4, 5), "b": (2, 3, 4, 5), "c": (7, 2, 3), "d": (4, 5), "e": (4, 5), "f": (4, 5), "g": (4, 5)}


def whole(name: str) -> Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(ord(name)), dtype=torch.float64)


def direction(stack: Tensor) -> Tensor:
    """Differs by matrix, and mixes its elements."""
    assert len(stack), "a rank that owns nothing computes nothing"
    return stack.cumsum(-1) / stack.norm(dim=(-2, -1), keepdim=True)


def slices(way: str, rank: int, size: int) -> dict[str, FlatSlice | None]:
    """Returns what a rank holds: all of each tensor, even slices of all or of each index of some dims, or a range of one
    buffer with all of them.
    """
    if way == "whole":
        return dict.fromkeys(SHAPES)
    held: dict[str, FlatSlice | None] = {}
    total, start = sum(torch.Size(shape).numel() for shape in SHAPES.values()), 0
    low, high = total * rank**2 // size**2, total * (rank + 1) ** 2 // size**2  # some rank has little
    for name, shape in SHAPES.items():
        numel = torch.Size(shape).numel()
        if way == "buffer":
            begin, end = max(low - start, 0), min(high - start, numel)
            if begin < end:
                held[name] = FlatSlice(shape, begin, end)
        else:
            dims = min(int(way), len(shape) - 2)
            inner = torch.Size(shape[dims:]).numel()
            part = -(-inner // size)
            held[name] = FlatSlice(shape, min(part * rank, inner), min(part * (rank + 1), inner), dims)
        start += numel
    return held


def elements(tensor: Tensor, held: FlatSlice | None) -> Tensor:
    if held is None:
        return tensor
    return tensor.reshape(*held.leading_shape, -1)[..., held.start : held.stop]


def come_back(way: str, size: int) -> tuple[int, list[int]]:
    """Returns the elements that this rank compared, and how many matrices it made a direction of at each call."""
    state = initialize_model_parallel(ParallelConfig(), "cpu")
    like, made = torch.zeros(1, dtype=torch.float64), []
    tags = {name: ParameterTag(init=Init(num_indexed_dims=len(shape) - 2)) for name, shape in SHAPES.items()}
    shards = {name: Shard(tags[name], shape, like) for name, shape in SHAPES.items()}
    held = slices(way, state.world.rank, size)
    pieces = {name: Piece(name, tags[name], part, like, like, True) for name, part in held.items()}

    def counted(stack: Tensor) -> Tensor:
        made.append(len(stack))
        return direction(stack)

    def step_of(name: str) -> Tensor:
        return elements(whole(name), held[name])

    found: dict[str, Tensor] = dict(WholeTensors(shards, pieces, state, {}).directions(counted, step_of))
    assert found.keys() == pieces.keys()
    for name, part in found.items():
        matrices = whole(name).view(-1, *SHAPES[name][-2:])
        expected = elements(direction(matrices).view(SHAPES[name]), held[name])
        assert torch.equal(part.reshape(expected.shape), expected), (way, name)
    return sum(part.numel() for part in found.values()), made


@pytest.mark.parametrize("way", ["whole", "0", "1", "2", "buffer"])
def test_each_element_gets_the_direction_of_its_whole_tensor(way: str) -> None:
    results: list[Any] = run_ranks(come_back, 3, way, 3)
    total = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert sum(count for count, _ in results) == total * (3 if way == "whole" else 1)
    # 12 + 7 + 4 matrices over three ranks: no two differ by more than one over all kinds.
    made = [sum(each) for _, each in results]
    assert sum(made) == 23 and max(made) - min(made) <= 1


def test_turns_go_round() -> None:
    assert even_sizes(5, 3, 0) == [2, 2, 1]
    assert even_sizes(5, 3, 2) == [2, 1, 2]
    assert even_sizes(1, 4, 3) == [0, 0, 0, 1]
    assert even_sizes(0, 2, 1) == [0, 0]
