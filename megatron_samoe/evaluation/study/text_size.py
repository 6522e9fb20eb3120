"""The bytes of text that a token stands for, by which losses of different tokenizers compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from megatron_samoe.config.data import DataConfig
from megatron_samoe.datasets.indexed_dataset import IndexedDataset
from megatron_samoe.datasets.tokenizer import build_tokenizer
from megatron_samoe.errors import DataError


def bits_per_byte(loss: float, data: DataConfig) -> float | None:
    """Returns a validation loss, nats per token, as bits per byte of the validation set's text.

    None where the set is a part of a corpus or a blend, or is not at hand with its tokenizer.
    """
    if len(data.valid_data_path) != 1:
        return None
    files = (data.tokenizer_type, data.tokenizer_model, data.vocab_file, data.merge_file)
    try:
        return loss / math.log(2) / _bytes_per_token(data.valid_data_path[0], files)
    except DataError:
        return None


@lru_cache(maxsize=16)
def _bytes_per_token(prefix: str, files: Sequence[str | None]) -> float:
    """Returns the bytes of a dataset's text over its tokens; ends of documents are tokens without text."""
    tokenizer, dataset = build_tokenizer(files[0] or "", *files[1:]), IndexedDataset(prefix)
    borders, num_bytes, num_tokens = dataset.document_indices, 0, 0
    for first, last in pairwise(borders):
        ids = np.concatenate([np.empty(0, dataset.dtype), *(dataset[int(i)] for i in range(first, last))])
        num_tokens += len(ids)
        num_bytes += len(tokenizer.decode(ids[ids != tokenizer.eod].tolist()).encode())
    if not num_bytes:
        raise DataError(f"{prefix} has no text.")
    return num_bytes / num_tokens
