"""From one tag: parts, owners and gradient groups, seen by all ranks of a world at once."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_samoe.parallel_state import (
    Group,
    RankGrid,
    ShardSpec,
)
from megatron_samoe.parallel_state.shard_spec import FlatSlice, is_counted_here
from tests.harness.tiny import state_of

GRIDS = [
    *(RankGrid(1), RankGrid(2, tp=2), RankGrid(4, ep=4), RankGrid(8, tp=2, ep=2), RankGrid(8, tp=2, etp=1, ep=4)),
    *(RankGrid(12, pp=3, ep=2), RankGrid(12, cp=3, ep=2), RankGrid(16, cp=2, pp=2, ep=4)),
    *(RankGrid(8, tp=2, pp=2, ep=2, etp=2), RankGrid(16, tp=4, ep=2, etp=4, pp=2)),
]
SPECS = [
    ShardSpec(),
    ShardSpec(partition=((0, "tp"),)),
    ShardSpec(partition=((1, "tp"),)),
    ShardSpec(partial=("tp",)),
    ShardSpec("embedding", ((0, "tp"),)),
    ShardSpec("expert", ((0, "ep"), (1, "etp"))),
    ShardSpec("expert", ((0, "ep"),), partial=("etp",)),
    ShardSpec("expert", partial=("etp", "ep")),
    ShardSpec("pool", ((1, "ep"), (2, "etp"))),
    ShardSpec("pool", ((1, "ep"),), partial=("etp",)),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_parts_rebuild_the_whole_and_have_one_owner_each(grid: RankGrid, spec: ShardSpec) -> None:
    whole = (
        torch.arange(3 * 8 * 16 * 4).view(24, 16, 4) if spec.family != "pool" else torch.arange(3072).view(3, 16, 64)
    )
    owners: dict[tuple[int, ...], int] = {}
    for stage in range(grid.pp):
        rebuilt = torch.full_like(whole, -1)
        for rank in range(grid.world_size):
            if grid.coordinates(rank, "dense")["pp"] != stage:
                continue
            state = state_of(grid, rank)
            part = spec.local_slice(whole, state)
            offsets = spec.offsets(part.shape, state)
            assert spec.global_shape(part.shape, state) == tuple(whole.shape)
            place = tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))
            assert torch.equal(whole[place], part)
            rebuilt[place] = part
            key = offsets if spec.family in ("pool", "embedding") else (stage, *offsets)
            owners[key] = owners.get(key, 0) + is_counted_here(spec, state, is_sliced=False)
        assert torch.equal(rebuilt, whole)
    assert set(owners.values()) == {1}, "each part is written, and counted in norms, exactly once"


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_boxes_make_up_a_run_of_elements(shape: list[int], data: st.DataObject) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    start = data.draw(st.integers(0, whole.numel()))
    part = FlatSlice(tuple(shape), start, data.draw(st.integers(start, whole.numel())))
    boxes = part.boxes()
    pieces = [whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].flatten() for box in boxes]
    run = torch.cat([torch.empty(0, dtype=torch.long), *pieces])
    assert run.tolist() == list(range(part.start, part.stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1), "few boxes: two ragged ends per dim"


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 5), max_size=3), st.integers(1, 9))
def test_members_of_a_group_share_a_tensor_out(shape: list[int], size: int) -> None:
    parts = [FlatSlice.of_rank(tuple(shape), Group("g", tuple(range(size)), rank)) for rank in range(size)]
    assert parts[0].start == 0 and parts[-1].stop == math.prod(shape)
    assert all(left.stop == right.start for left, right in pairwise(parts))
    assert all(part.stop - part.start <= -(-math.prod(shape) // size) for part in parts)
