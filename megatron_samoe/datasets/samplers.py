"""Which samples a data-parallel rank reads, and in which order: pure arithmetic, no random state shared with the model.

A sampler gets the number of samples that the run has consumed; it depends on nothing else, so a run resumes exactly, also
with another number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_samoe.errors import DataError


class PretrainingSampler:
    """Yields the sample numbers of each micro-batch of one rank, in the dataset's order (`--dataloader-type single`).

    Consecutive chunks of micro_batch_size * data_parallel_size samples; rank r takes its slice of each. A last
    incomplete chunk is left out.
    """

    def __init__(
        self,
        total_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ):
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise DataError(f"Data-parallel rank {data_parallel_rank} is not in 0 to {data_parallel_size - 1}.")
        if micro_batch_size < 1 or consumed_samples < 0:
            raise DataError(
                f"micro_batch_size = {micro_batch_size} must be at least 1, consumed_samples = {consumed_samples} at "
                "least 0."
            )
        if consumed_samples >= total_samples:
            raise DataError(
                f"All {total_samples} samples of the dataset are consumed ({consumed_samples} so far): nothing is "
                "left to "
                "read. Lower --train-iters, or give more data."
            )
        self.total_samples, self.consumed_samples = total_samples, consumed_samples
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank, self.data_parallel_size = data_parallel_rank, data_parallel_size

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


class PretrainingRandomSampler(PretrainingSampler):
    """The same, over a new permutation of the dataset in every epoch, without end (`--dataloader-type cyclic`).

    Position p of the run is permutation(seed, p // total_samples)[p % total_samples] whatever the number of ranks
    (Megatron's own cyclic order depends on it). An epoch does not end at a batch border: a micro-batch may hold the
    end of one and the start of the next.
    """

    def __init__(
        self,
        total_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        seed: int,
    ):
        if total_samples < 1:
            raise DataError("The dataset has no samples.")
        super().__init__(
            consumed_samples + 1, consumed_samples, micro_batch_size, data_parallel_rank, data_parallel_size
        )
        self.total_samples, self.seed = total_samples, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

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
