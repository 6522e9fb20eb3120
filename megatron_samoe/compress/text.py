"""The text that a compression reads: consecutive tokens of an indexed dataset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_samoe.datasets.indexed_dataset import IndexedDataset
from megatron_samoe.errors import DataError

#: Tokens of a forward pass.
TOKENS_PER_PASS = 4096


@dataclass(frozen=True)
class Text:
    """A part of an indexed dataset, its documents one after the other.

    Attributes:
        start, num_tokens: which tokens; one more is read as the last label.
    """

    prefix: str
    start: int
    num_tokens: int

    def passes(self, seq_length: int, vocab_size: int, flag: str) -> list[Tensor]:
        """Returns ids [B, S + 1] of each forward pass; what is left below a sequence is not read.

        Raises:
            DataError: the dataset is shorter, or was made with another tokenizer.
        """
        dataset = IndexedDataset(self.prefix)
        needed = self.start + self.num_tokens + 1
        if dataset.num_tokens < needed:
            raise DataError(
                f"{flag} {self.prefix} has {dataset.num_tokens:,} tokens; {needed:,} are needed: {self.num_tokens:,} from "
                f"token {self.start:,} on, and one to predict. Give longer text, or ask for fewer tokens."
            )
        ids = torch.from_numpy(_read(dataset, self.start, self.num_tokens + 1).astype(np.int64))
        if int(ids.max()) >= vocab_size:
            raise DataError(
                f"{flag} {self.prefix} has token {int(ids.max())}, and the model's vocabulary {vocab_size} entries: it was "
                "made with another tokenizer."
            )
        count = self.num_tokens // seq_length
        windows = ids.unfold(0, seq_length + 1, seq_length)[:count]
        return list(windows.split(max(1, TOKENS_PER_PASS // seq_length)))


def _read(dataset: IndexedDataset, start: int, count: int) -> np.ndarray:
    ends = np.cumsum(dataset.sequence_lengths, dtype=np.int64)
    first = int(np.searchsorted(ends, start, side="right"))
    offset = start - (int(ends[first - 1]) if first else 0)
    return np.concatenate(list(_parts(dataset, first, offset, count)))


def _parts(dataset: IndexedDataset, number: int, offset: int, count: int) -> Iterator[np.ndarray]:
    while count > 0:
        part = dataset.get(number, offset, min(count, int(dataset.sequence_lengths[number]) - offset))
        yield part
        number, offset, count = number + 1, 0, count - len(part)
