"""The text that a compression reads: consecutive tokens of an indexed dataset, and what of it is held out."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_samoe.datasets import manifest
from megatron_samoe.datasets.indexed_dataset import IndexedDataset, get_bin_path
from megatron_samoe.errors import DataError

#: Tokens of a forward pass.
TOKENS_PER_PASS = 4096


@dataclass(frozen=True)
class Text:
    """A part of an indexed dataset, its documents one after the other.

    Attributes:
        start, num_tokens: which tokens; one more is read as the last label.
        end: token that others begin with, before which these must end; the dataset's end if not given.
    """

    prefix: str
    start: int
    num_tokens: int
    end: int | None = None

    def passes(self, seq_length: int, vocab_size: int, flag: str) -> list[Tensor]:
        """Returns ids [B, S + 1] of each forward pass; what is left below a sequence is not read.

        Raises:
            DataError: the dataset is shorter, or was made with another tokenizer.
        """
        dataset = IndexedDataset(self.prefix)
        needed = self.start + self.num_tokens + 1
        there, what = dataset.num_tokens, "tokens"
        if self.end is not None:
            there, what = self.end, "tokens before the documents that are held out"
        if there < needed:
            raise DataError(
                f"{flag} {self.prefix} has {there:,} {what}; {needed:,} are needed: {self.num_tokens:,} from token "
                f"{self.start:,} on, and one to predict. Give longer text, or ask for fewer tokens."
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


def last_documents(prefix: str, num_tokens: int, flag: str) -> tuple[int, str]:
    """Returns the token with which the fewest last documents begin that have a number of tokens and one to predict, and the --split
    that leaves them to validation.

    Raises:
        DataError: the dataset is missing, or no document is before them.
    """
    dataset = IndexedDataset(prefix)
    before_D = np.concatenate(([0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)))[dataset.document_indices]
    first = int(np.searchsorted(before_D, before_D[-1] - num_tokens - 1, side="right")) - 1
    if first < 1:
        raise DataError(
            f"{flag} {prefix} has {dataset.num_documents:,} documents with {dataset.num_tokens:,} tokens: its last documents with "
            f"{num_tokens:,} tokens, and one to predict, are all of it, and cannot be held out. Give --valid-data-path, text in "
            "more documents, or fewer --judge-tokens."
        )
    sequences = int(dataset.document_indices[first])
    return int(before_D[first]), f"{sequences},{len(dataset) - sequences},0"


def are_one_dataset(one: str, other: str) -> bool:
    """Whether two prefixes name the same tokens, as far as paths and manifests say."""
    if os.path.realpath(get_bin_path(one)) == os.path.realpath(get_bin_path(other)):
        return True
    records = [manifest.read(prefix) for prefix in (one, other)]
    sums = [None if record is None else (record.bin_bytes, record.bin_crc32) for record in records]
    return sums[0] is not None and sums[0] == sums[1]


def _read(dataset: IndexedDataset, start: int, count: int) -> np.ndarray:
    ends = np.cumsum(dataset.sequence_lengths, dtype=np.int64)
    number, parts = int(np.searchsorted(ends, start, side="right")), []
    offset = start - (int(ends[number - 1]) if number else 0)
    while count > 0:
        parts.append(dataset.get(number, offset, min(count, int(dataset.sequence_lengths[number]) - offset)))
        number, offset, count = number + 1, 0, count - len(parts[-1])
    return np.concatenate(parts)
