"""Samplers and the loader: orders, resumption, and reads ahead."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_samoe.datasets.loader import DataLoader
from megatron_samoe.datasets.samplers import PretrainingRandomSampler, PretrainingSampler
from megatron_samoe.errors import DataError

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 5))


@given(total=st.integers(1, 200), consumed=st.integers(0, 199), sizes=SIZES)
@settings(deadline=None)
def test_single_sampler(total: int, consumed: int, sizes: tuple[int, int]) -> None:
    micro, ranks = sizes
    if consumed >= total:
        with pytest.raises(DataError, match="consumed"):
            PretrainingSampler(total, consumed, micro, 0, ranks)
        return
    samplers = [PretrainingSampler(total, consumed, micro, rank, ranks) for rank in range(ranks)]
    streams = [list(sampler) for sampler in samplers]
    assert {len(stream) for stream in streams} == {len(samplers[0])}
    read = [i for step in zip(*streams, strict=True) for part in step for i in part]
    assert read == list(range(consumed, consumed + len(read))) and total - consumed - len(read) < micro * ranks


def _take(iterator: Iterator[list[int]], count: int) -> list[int]:
    read: list[int] = []
    while len(read) < count:
        read.extend(next(iterator))
    return read[:count]


@given(total=st.integers(1, 60), consumed=st.integers(0, 150), sizes=SIZES, seed=st.integers(0, 9))
@settings(deadline=None)
def test_cyclic_sampler_does_not_depend_on_the_ranks(
    total: int, consumed: int, sizes: tuple[int, int], seed: int
) -> None:
    micro, ranks = sizes
    whole = _take(iter(PretrainingRandomSampler(total, 0, 1, 0, 1, seed)), consumed + 40)
    streams = [iter(PretrainingRandomSampler(total, consumed, micro, rank, ranks, seed)) for rank in range(ranks)]
    resumed = [i for _ in range(40 // (micro * ranks)) for stream in streams for i in next(stream)]
    assert resumed == whole[consumed : consumed + len(resumed)]


@given(total=st.integers(1, 60), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_each_epoch_of_a_cyclic_sampler_has_an_order_of_its_own(total: int, seed: int) -> None:
    orders = []
    for number in (seed, (seed + 1) % 2**32):
        read = _take(iter(PretrainingRandomSampler(total, 0, 3, 0, 1, number)), 3 * total)
        epochs = [tuple(read[start : start + total]) for start in range(0, 3 * total, total)]
        assert all(sorted(epoch) == list(range(total)) for epoch in epochs), "each sample once"
        orders += [tuple(range(total)), *epochs]
    assert total < 20 or len(set(orders)) == 7, "of two seeds, and of no seed"


def test_samplers_refuse_nonsense() -> None:
    for arguments in ((10, 0, 1, 2, 2), (10, 0, 0, 0, 1), (10, -1, 1, 0, 1)):
        with pytest.raises(DataError):
            PretrainingSampler(*arguments)


class _Slow:
    def __init__(self, fail_at: int = -1):
        self.reads, self.fail_at = 0, fail_at

    def get_batch(self, indices: list[int]) -> dict[str, torch.Tensor]:
        time.sleep(0.01)
        self.reads += 1
        if self.fail_at in indices:
            raise DataError("damaged")
        return {"tokens": torch.tensor(indices)}


def test_the_loader_reads_ahead_a_little_and_stops_when_left() -> None:
    slow = _Slow()
    iterator = iter(DataLoader(slow, PretrainingSampler(1000, 0, 1, 0, 1), num_workers=2))
    next(iterator)
    deadline = time.monotonic() + 20
    while slow.reads < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert slow.reads == 5, "one batch was taken, and two per thread are ready"
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    time.sleep(0.1)
    assert slow.reads <= 7


def test_an_error_of_a_read_comes_where_the_batch_is_due() -> None:
    iterator = iter(DataLoader(_Slow(fail_at=2), PretrainingSampler(10, 0, 1, 0, 1), num_workers=1))
    assert [int(next(iterator)["tokens"]) for _ in range(2)] == [0, 1]
    with pytest.raises(DataError, match="damaged"):
        next(iterator)
