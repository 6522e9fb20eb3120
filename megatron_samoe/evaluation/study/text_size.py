"""The bytes of text of a token, by which losses of different tokenizers compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from megatron_samoe.config.data import DataConfig
from megatron_samoe.datasets.build import sequences_of, splits_of
from megatron_samoe.datasets.carried_tokenizer import with_carried
from megatron_samoe.datasets.indexed_dataset import IndexedDataset
from megatron_samoe.datasets.tokenizer import build_tokenizer
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.errors import DataError

#: Of a larger validation set documents at even distances are decoded, about this number of tokens: a report shall not take minutes.
MOST_TOKENS = 1 << 22


def bits_per_byte(loss: float, data: DataConfig, run_dir: Path | None = None) -> float | None:
    """Returns a validation loss, nats per token, as bits per byte of the validation set's text.

    None where the set is not at hand with its tokenizer.

    Args:
        run_dir: a run's, whose checkpoints carry the tokenizer; they count where the files that `data` names are gone.
    """
    if data.mock_data:
        return None
    iterations = [] if run_dir is None else store.whole_iterations(run_dir / "checkpoints")
    if run_dir is not None and iterations:
        newest = store.iteration_dir(run_dir / "checkpoints", iterations[-1])
        data = with_carried(data, newest, only_missing=True)
    try:
        return loss / math.log(2) / _bytes_per_token(data)
    except DataError:
        return None


def _bytes_per_token(data: DataConfig) -> float:
    """Returns the bytes of the validation set's text over its tokens: those of a blend in proportion to its weights."""
    split = next((split for split in splits_of(data) if split.name == "valid"), None)
    if split is None or split.share is None:
        raise DataError("There is no validation set.")
    files, blend = (data.tokenizer_type, data.tokenizer_model, data.vocab_file, data.merge_file), split.blend
    texts = [_text_of(prefix, split.share, files) for prefix in blend.prefixes]
    if blend.weights is None:
        return sum(num_bytes for num_bytes, _ in texts) / sum(num_tokens for _, num_tokens in texts)
    weighted = zip(blend.weights, texts, strict=True)
    return sum(weight * num_bytes / num_tokens for weight, (num_bytes, num_tokens) in weighted) / sum(blend.weights)


@lru_cache(maxsize=64)
def _text_of(prefix: str, share: tuple[float, float], files: Sequence[str | None]) -> tuple[int, int]:
    """Returns bytes and tokens of the text of a share of a dataset; ends of documents are tokens without text."""
    tokenizer, dataset = build_tokenizer(files[0] or "", *files[1:]), IndexedDataset(prefix)
    first, last = sequences_of(dataset, share)
    documents = [(a, b) for a, b in pairwise(np.clip(dataset.document_indices, first, last).tolist()) if a < b]
    num_tokens = sum(int(dataset.sequence_lengths[a:b].sum()) for a, b in documents)
    num_bytes = num_seen = 0
    for a, b in documents[:: max(1, num_tokens // MOST_TOKENS)]:
        ids = np.concatenate([dataset[i] for i in range(a, b)])
        num_seen += len(ids)
        num_bytes += len(tokenizer.decode(ids[ids != tokenizer.eod].tolist()).encode())
    if not num_bytes:
        raise DataError(f"{prefix} has no text.")
    return num_bytes, num_seen
