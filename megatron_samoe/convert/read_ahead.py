"""Reading the next tensor while the last one is written: two tensors in memory, and neither disk nor processor waits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor

from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors, StoredTensor

Progress = Callable[[int], object]


class ReadAhead:
    """A source that reads one tensor of another ahead in a thread, while the block of its `with` lasts.

    Args:
        order: in which tensors will be asked for; other orders work and gain nothing.
        progress: called with the bytes of each tensor that is given.
    """

    def __init__(self, source: GlobalTensors, order: Sequence[str], progress: Progress = lambda num_bytes: None):
        self.source, self._progress = source, progress
        self.config, self.train_state, self.attachments = source.config, source.train_state, source.attachments
        self.tensors: Mapping[str, StoredTensor] = source.tensors
        self._next = dict(itertools.pairwise(order))
        self._ahead: tuple[str, Future[Tensor]] | None = None
        # All reading is done there: sources need not bear several threads.
        self._reader = ThreadPoolExecutor(1)

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._ahead = None

    def read(self, name: str) -> Tensor:
        """Returns a tensor, and begins to read the one after it."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != name:
            del ahead  # read for nothing
            tensor = self._reader.submit(self.source.read, name).result()
        else:
            tensor = ahead[1].result()
        if (following := self._next.get(name)) is not None:
            self._ahead = following, self._reader.submit(self.source.read, following)
        self._progress(self.tensors[name].num_bytes)
        return tensor
