"""Which samples a data-parallel rank reads, and in which order: pure arithmetic, no random state shared with the model.

A sampler gets the number of samples that the run has consumed; it depends on nothing else, so a run resumes exactly, also
with another number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from megatron_samoe.errors import DataError


@dataclass
class PretrainingSampler:
    """Yields the sample numbers of each micro-batch of one rank, in the dataset's order (`--dataloader-type single`).

    Consecutive chunks of micro_batch_size * data_parallel_size samples; rank r takes its slice of each. A last
    incomplete chunk is left out.
    """

    total_samples: int
    consumed_samples: int
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int

    def __post_init__(self) -> None:
        if not 0 <= self.data_parallel_rank < self.data_parallel_size:
            raise DataError(
                f"Data-parallel rank {self.data_parallel_rank} is not in 0 to {self.data_parallel_size - 1}."
            )
        if self.micro_batch_size < 1 or self.consumed_samples < 0:
            sizes = f"micro_batch_size = {self.micro_batch_size} must be at least 1, consumed_samples = {self.consumed_samples}"
            raise DataError(f"{sizes} at least 0.")
        self._check_samples()

    def _check_samples(self) -> None:
        if self.consumed_samples >= self.total_samples:
            raise DataError(
                f"All {self.total_samples} samples of the dataset are consumed ({self.consumed_samples} so far): nothing is "
                "left to read. Lower --train-iters, or give more data."
            )

    def __len__(self) -> int:
        """Returns how many micro-batches this rank has left."""
        return (self.total_samples - self.consumed_samples) // (self.micro_batch_size * self.data_parallel_size)

    def __iter__(self) -> Iterator[list[int]]:
        step = self.micro_batch_size * self.data_parallel_size
        for start in range(self.consumed_samples, self.total_samples - step + 1, step):
            first = start + self.data_parallel_rank * self.micro_batch_size
            yield self._numbers(first, first + self.micro_batch_size)

    def _numbers(self, first: int, last: int) -> list[int]:
        return list(range(first, last))


@dataclass
class PretrainingRandomSampler(PretrainingSampler):
    """The same, over a new permutation of the dataset in every epoch, without end (`--dataloader-type cyclic`).

    Position p of the run is permutation(seed, p // total_samples)[p % total_samples] whatever the number of ranks
    (Megatron's own cyclic order depends on it). An epoch does not end at a batch border: a micro-batch may hold the
    end of one and the start of the next.
    """

    seed: int
    _epoch: int = field(default=-1, init=False)
    _permutation: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64), init=False)

    def _check_samples(self) -> None:
        if self.total_samples < 1:
            raise DataError("The dataset has no samples.")

    def __len__(self) -> int:
        raise TypeError("a cyclic sampler has no end")

    def __iter__(self) -> Iterator[list[int]]:
        step = self.micro_batch_size * self.data_parallel_size
        start = self.consumed_samples + self.data_parallel_rank * self.micro_batch_size
        while True:
            yield self._numbers(start, start + self.micro_batch_size)
            start += step

    def _numbers(self, first: int, last: int) -> list[int]:
        numbers = []
        for position in range(first, last):
            epoch, place = divmod(position, self.total_samples)
            if epoch != self._epoch:
                self._epoch = epoch
                self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.total_samples)
            numbers.append(int(self._permutation[place]))
        return numbers
