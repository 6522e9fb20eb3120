"""The split of sequences over context-parallel ranks: nothing is lost, order comes back, and the work is even."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_samoe.errors import DataError
from megatron_samoe.parallel_state.token_share import TokenShare, whole_sequences

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


def test_chunks_by_hand() -> None:
    assert [TokenShare((rank, 3)).chunks for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]
    assert TokenShare((1, 2)).of_sequences(torch.arange(8), 0).tolist() == [2, 3, 4, 5]


def test_a_sequence_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(
        DataError, match="A sequence of 10 tokens cannot be cut into 2 x --context-parallel-size 2 chunks"
    ):
        TokenShare((0, 2)).of_sequences(torch.zeros(1, 10))
