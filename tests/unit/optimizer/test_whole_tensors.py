"""Ranks own as many tensors as others; test_layout_parity and test_resharding_matrix bring directions to them and back."""

from __future__ import annotations

from megatron_samoe.optimizer.whole_tensors import _share, even_sizes
from megatron_samoe.parallel_state import Group


def test_turns_go_round() -> None:
    assert even_sizes(5, 3, 0) == [2, 2, 1]
    assert even_sizes(5, 3, 2) == [2, 1, 2]
    assert even_sizes(1, 4, 3) == [0, 0, 0, 1]
    assert even_sizes(0, 2, 1) == [0, 0]
    turns: dict[str, int] = {}
    shares = [_share(count, Group("edp", (0, 1, 2), 0), "edp", turns) for count in (12, 7, 4)]
    owned = [sum(of_rank) for of_rank in zip(*shares, strict=True)]
    assert sum(owned) == 23 and max(owned) - min(owned) <= 1, "over all kinds of tensors"
