"""Groups of ranks, up to worlds of 4096; and the split of sequences over context-parallel ranks: nothing is lost, order comes back,
and the work is even."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_samoe.errors import DataError
from megatron_samoe.parallel_state import RankGrid
from megatron_samoe.parallel_state.rank_grid import GROUPS
from megatron_samoe.parallel_state.token_share import TokenShare, whole_sequences

pytestmark = pytest.mark.distributed


def sizes_of(product: int) -> st.SearchStrategy[int]:
    return st.sampled_from([d for d in range(1, product + 1) if product % d == 0])


@st.composite
def grids(draw: st.DrawFn, largest: int = 4096) -> RankGrid:
    world = draw(st.sampled_from([1, 2, 3, 6, 8, 12, 30, 64, 96, 256, 1000, 1024, 4096]).filter(lambda n: n <= largest))
    pp = draw(sizes_of(world))
    tp = draw(sizes_of(world // pp))
    cp = draw(sizes_of(world // pp // tp))
    etp = draw(st.sampled_from([1, tp]))
    ep = draw(sizes_of(world // pp // etp))
    return RankGrid(world, tp=tp, pp=pp, ep=ep, etp=etp, cp=cp)


@settings(deadline=None, max_examples=60)
@given(grids())
def test_every_group_partitions_the_world(grid: RankGrid) -> None:
    assert grid.tp * grid.cp * grid.dp * grid.pp == grid.etp * grid.ep * grid.edp * grid.pp == grid.world_size
    for name in GROUPS:
        groups = grid.groups(name)
        assert sorted(rank for ranks in groups for rank in ranks) == list(range(grid.world_size)), name
        if name != "embed_dp":
            assert len({len(ranks) for ranks in groups}) == 1, name
        for ranks in (groups[0], groups[len(groups) // 2], groups[-1]):
            numbers = [(len(ranks), number) for number in range(len(ranks))]
            assert [grid.size_and_rank(name, rank) for rank in ranks] == numbers, name
        assert all(list(ranks) == sorted(ranks) for ranks in groups), "members are in the order of their ranks"
        assert [ranks[0] for ranks in groups] == sorted(ranks[0] for ranks in groups)


@settings(deadline=None, max_examples=60)
@given(grids(96))
def test_wide_groups_are_unions_of_narrow_ones(grid: RankGrid) -> None:
    """A stage is its tensor x context x data ranks, and no group but those that cross stages leaves it."""
    stages = [set(ranks) for ranks in grid.groups("stage")]
    assert stages == [set(ranks) for ranks in grid.groups("tp_dp_cp")]
    for name in ("tp", "cp", "dp", "dp_cp", "etp", "ep", "edp", "etp_edp"):
        for ranks in grid.groups(name):
            assert sum(set(ranks) <= stage for stage in stages) == 1
    for wide, narrow in (("pool_dp", "edp"), ("etp_pool_dp", "pool_dp"), ("world", "pool_dp"), ("pool_dp", "pp")):
        for ranks in grid.groups(narrow):
            assert sum(set(ranks) <= set(other) for other in grid.groups(wide)) == 1
    if grid.etp == grid.tp:
        assert all(
            sum(set(ranks) <= set(others) for others in grid.groups("dp_cp")) == 1 for ranks in grid.groups("ep")
        ), "experts split like the dense part exchange tokens among ranks that hold its replicas"


def test_groups_by_hand() -> None:
    grid = RankGrid(8, tp=2, ep=2, etp=2)
    assert grid.groups("tp") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert grid.groups("dp") == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert grid.groups("ep") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert grid.groups("edp") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    whole_experts = RankGrid(8, tp=2, ep=4, etp=1)
    assert whole_experts.groups("ep") == [(0, 1, 2, 3), (4, 5, 6, 7)]
    contexts = RankGrid(16, tp=2, cp=2, pp=2, ep=4, etp=2)
    assert contexts.groups("cp") == [(0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 14), (13, 15)]
    assert contexts.groups("dp")[:2] == [(0, 4), (1, 5)]
    assert contexts.groups("dp_cp")[:2] == contexts.groups("ep")[:2] == [(0, 2, 4, 6), (1, 3, 5, 7)], (
        "ep spans cp and dp"
    )
    stages = RankGrid(8, tp=2, pp=2, ep=2, etp=2)
    assert stages.groups("pp") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert stages.groups("pool_dp") == stages.groups("pp")


@pytest.mark.parametrize(
    "sizes", [{"tp": 3}, {"ep": 3}, {"pp": 16}, {"tp": 2, "etp": 2, "ep": 8}, {"tp": 0}, {"tp": 2, "cp": 3}]
)
def test_sizes_that_do_not_fill_the_world_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="does not divide the world of 8 ranks"):
        RankGrid(8, **sizes)


@settings(deadline=None, max_examples=60)
@given(grids(256))
def test_tied_embeddings_are_shared_by_the_first_and_the_last_stage_alone(grid: RankGrid) -> None:
    for ranks in grid.groups("embed_dp"):
        places = [grid.coordinates(rank, "dense") for rank in ranks]
        assert len({place["tp"] for place in places}) == 1
        stages = {place["pp"] for place in places}
        outer = {0, grid.pp - 1}
        assert stages == outer or (len(stages) == 1 and not stages & outer)
        assert len(ranks) == grid.cp * grid.dp * len(stages)


SIZES = st.integers(1, 8)


@given(cp=SIZES, tokens=st.integers(1, 4), batch=st.integers(1, 3))
def test_parts_make_the_whole_in_order(cp: int, tokens: int, batch: int) -> None:
    whole = torch.arange(batch * 2 * cp * tokens * 3).view(batch, -1, 3)
    parts = torch.stack([TokenShare((rank, cp)).of_sequences(whole) for rank in range(cp)])
    assert parts.shape == (cp, batch, 2 * tokens, 3)
    assert torch.equal(whole_sequences(parts, cp), whole)


@given(cp=SIZES, tokens=st.integers(1, 3))
def test_spans_are_the_places_of_chunks(cp: int, tokens: int) -> None:
    whole = torch.arange(2 * cp * tokens)
    for rank in range(cp):
        share = TokenShare((rank, cp))
        own = torch.cat([whole[start:stop] for start, stop in share.spans(len(whole))])
        assert torch.equal(own, share.of_sequences(whole, 0))


@given(cp=SIZES, tokens=st.integers(1, 5))
def test_the_queries_of_every_rank_meet_as_many_keys(cp: int, tokens: int) -> None:
    positions = torch.arange(2 * cp * tokens)[None]
    scores = {int((TokenShare((rank, cp)).of_sequences(positions) + 1).sum()) for rank in range(cp)}
    assert len(scores) == 1


def test_a_sequence_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(DataError, match=r"10 tokens cannot be cut .*--context-parallel-size 2"):
        TokenShare((0, 2)).of_sequences(torch.zeros(1, 10))
