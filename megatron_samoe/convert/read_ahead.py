"""Reading the next tensor while the last one is written: two tensors in memory, and neither disk nor processor waits."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from torch import Tensor

from megatron_samoe.dist_checkpointing.global_tensors import GlobalTensors, StoredTensor


class Passed:
    """A source that hands another one on; see `GlobalTensors`."""

    def __init__(self, source: GlobalTensors, config: Mapping[str, Any] | None = None):
        self.source = source
        self.config: Mapping[str, Any] = source.config if config is None else config
        self.train_state: Mapping[str, Any] = source.train_state
        self.tensors: Mapping[str, StoredTensor] = source.tensors
        self.attachments: Mapping[str, bytes] = source.attachments

    def read(self, name: str) -> Tensor:
        """Returns a tensor as it is."""
        return self.source.read(name)


class ReadAhead(Passed):
    """A source that reads one tensor ahead in a thread, while the block of its `with` lasts.

    Args:
        order: in which tensors will be asked for; other orders work and gain nothing.
    """

    def __init__(self, source: GlobalTensors, order: Sequence[str]):
        super().__init__(source)
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
        return tensor
