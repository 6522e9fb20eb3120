"""Reads micro-batches ahead of the training loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

Batch = dict[str, torch.Tensor]
AHEAD_PER_THREAD = 2


class DataLoader:
    """Iterates over the micro-batches that a sampler names, read by threads a few batches ahead, in order.

    Threads suffice: a sample is copied by compiled code that holds no interpreter lock. Nothing here draws a random
    number, so neither the prefetching nor the number of workers can change what a model sees; a run resumes by making
    the sampler with the samples consumed, not those read ahead. An error of a read is raised where its batch is due.

    Args:
        dataset: has `get_batch(indices)`.
        sampler: yields lists of sample numbers.
        num_workers: threads; 0 reads in the loop.
        transform: applied to each batch in the thread, for example to pin its memory.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: Iterable[list[int]],
        num_workers: int = 1,
        transform: Callable[[Batch], Batch] | None = None,
    ):
        self.dataset, self.sampler, self.num_workers, self._transform = dataset, sampler, num_workers, transform

    def _read(self, indices: list[int]) -> Batch:
        batch = self.dataset.get_batch(indices)
        return self._transform(batch) if self._transform is not None else batch

    def __iter__(self) -> Iterator[Batch]:
        if self.num_workers == 0:
            yield from map(self._read, self.sampler)
            return
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="data")
        ahead: deque[Future[Batch]] = deque()
        try:
            for indices in self.sampler:
                ahead.append(pool.submit(self._read, indices))
                if len(ahead) > self.num_workers * AHEAD_PER_THREAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
