"""Builds the training, validation and test datasets of a run from its configuration."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_samoe.config.data import DataConfig
from megatron_samoe.datasets import blends, manifest
from megatron_samoe.datasets.bin_readers import is_remote
from megatron_samoe.datasets.blended_dataset import BlendedDataset, blend_indices, normalize
from megatron_samoe.datasets.gpt_dataset import GPTDataset, MockGPTDataset, SampleFormat
from megatron_samoe.datasets.indexed_dataset import IndexedDataset, require_dataset
from megatron_samoe.datasets.tokenizer import Tokenizer
from megatron_samoe.errors import DataError
from megatron_samoe.log import logger

# Of each dataset of a weighted blend this much more is prepared than its weight asks for, as Megatron-core does
# (it decides at which epoch the order of a dataset is drawn, so the same samples need the same figure).
BLEND_SURPLUS = 0.005
# Without a manifest, this many bytes of a dataset are searched for ids outside the vocabulary at the start.
SCAN_BYTES = 1 << 26

Dataset = GPTDataset | BlendedDataset | MockGPTDataset


def build_train_valid_test_datasets(
    data: DataConfig,
    num_samples: tuple[int | None, int | None, int | None],
    seq_length: int,
    seed: int,
    tokenizer: Tokenizer,
    barrier: Callable[[], None] | None = None,
    turn: int = 0,
    evaluation_seed: int | None = None,
    optional: Collection[str] = (),
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """Returns the datasets of the three splits; None for a split of which 0 samples are needed.

    Args:
        data: paths, split and sample options.
        num_samples: samples needed of train, valid, test; None for one epoch.
        seq_length: tokens per sample.
        seed: of the sample order.
        tokenizer: the one that made the data.
        barrier: waits for all ranks. Given, ranks build the indices, or read those that are there, in three turns: where
            hosts share a cache they are built once, else once a host.
        turn: of this rank: 0 for the first, 1 for the first of another host, 2 for the others.
        evaluation_seed: of the order of validation and test samples, in place of `seed`.
        optional: splits that may be missing, and are said to be, where they have no data or too few.

    Raises:
        DataError: a dataset is missing, damaged, made with another tokenizer, too short, or a needed split is empty.
    """
    sample_format = SampleFormat(
        seq_length,
        tokenizer.eod,
        data.vocab_size or tokenizer.vocab_size,
        data.reset_position_ids,
        data.reset_attention_mask,
        data.eod_mask_loss,
    )
    seeds = (seed, *2 * (seed if evaluation_seed is None else evaluation_seed,))
    builder = _Builder(data, dict(zip(blends.SPLITS, seeds, strict=True)), sample_format, tokenizer, optional)
    if barrier is None:
        return builder.build(num_samples)
    for _ in range(turn):
        barrier()
    try:
        return builder.build(num_samples)
    finally:
        # Also after an error: the others get the same one, and do not wait for ever.
        for _ in range(2 - turn):
            barrier()


@dataclass(frozen=True)
class Split:
    """The source of a split.

    Attributes:
        share: of each dataset; None for nothing.
        own_data: the blend is this split's only.
    """

    name: str
    blend: blends.Blend
    share: tuple[float, float] | None
    own_data: bool


def splits_of(data: DataConfig) -> Iterator[Split]:
    """Yields the splits that the configuration has data for."""
    per_split = {name: getattr(data, f"{name}_data_path") for name in blends.SPLITS}
    if data.data_path and any(per_split.values()):
        raise DataError("--data-path and --train-data-path, --valid-data-path, --test-data-path exclude each other.")
    for name, words in per_split.items():
        blend = blends.parse_blend(words) if words else None
        if isinstance(blend, dict):
            raise DataError(f"--{name}-data-path takes a list of datasets; a file with splits goes to --data-path.")
        if blend is not None:
            yield Split(name, blend, (0.0, 1.0), own_data=True)
    if any(per_split.values()):
        return
    if not data.data_path:
        raise DataError(
            "No data: give --data-path, or --train-data-path (and --valid-data-path, --test-data-path), or --mock-data."
        )
    blend = blends.parse_blend(data.data_path)
    if isinstance(blend, dict):
        yield from (Split(name, part, (0.0, 1.0), own_data=True) for name, part in blend.items())
    else:
        for name, share in zip(blends.SPLITS, blends.split_bounds(data.split), strict=True):
            yield Split(name, blend, share, own_data=False)


@dataclass(frozen=True)
class _Builder:
    data: DataConfig
    seeds: Mapping[str, int]
    format: SampleFormat
    tokenizer: Tokenizer
    optional: Collection[str]

    def build(self, num_samples: tuple[int | None, ...]) -> Any:
        """Returns the three datasets."""
        counts = dict(zip(blends.SPLITS, num_samples, strict=True))
        if self.data.mock_data:
            return tuple(
                None if count == 0 else MockGPTDataset(count or 100_000, self.seeds[name] + 1000 * place, self.format)
                for place, (name, count) in enumerate(counts.items())
            )
        splits = {split.name: split for split in splits_of(self.data)}
        return tuple(
            None if count == 0 else self._build_or_leave_out(name, splits.get(name), count)
            for name, count in counts.items()
        )

    def _build_or_leave_out(self, name: str, split: Split | None, count: int | None) -> Dataset | None:
        is_optional = name in self.optional
        if split is None or (split.share is None and is_optional):
            if is_optional:
                return None
            flag = f"--{name}-data-path"
            raise DataError(
                f"The {name} split is needed ({count} samples) but has no data: give {flag}, or --data-path."
            )
        try:
            return self._build_split(split, count)
        except DataError as error:
            if not is_optional:
                raise
            logger.info(f"There will be no {name} loss. {error}")
            return None

    def _build_split(self, split: Split, count: int | None) -> Dataset:
        name, share = split.name, split.share
        if share is None:
            raise DataError(
                f"The {name} split is needed ({'one epoch' if count is None else f'{count} samples'}) but "
                f"--split {self.data.split} gives it nothing."
            )
        blend = split.blend.without_zero_weights()
        if count is None and name != "train":
            blend = blends.Blend(blend.prefixes)  # each dataset is evaluated whole, whatever its weight
        for prefix in blend.prefixes:
            require_dataset(prefix)
        self._check_one_tokenizer(blend.prefixes)
        if len(blend.prefixes) == 1 and (blend.weights is None or split.own_data):
            return self._build_one(name, blend.prefixes[0], share, count)
        cache = self._cache(blend.prefixes[0])
        if blend.weights is None:
            parts = [self._build_one(name, prefix, share, None) for prefix in blend.prefixes]
            sizes = [len(part) for part in parts]
            size = None if count is None else min(count, sum(sizes))
            return BlendedDataset(parts, blend_indices(None, sizes, size, cache))
        if count is None:
            raise DataError(
                f"The {name} blend has weights, which need a number of samples; leave the weights out for one epoch."
            )
        shares = normalize(blend.weights).tolist()
        targets = [math.ceil(count * weight) for weight in shares]
        indices = blend_indices(shares, None, sum(targets), cache)
        drawn = np.bincount(indices[0], minlength=len(shares)).tolist()
        prepared = [max(math.ceil(n * (1 + BLEND_SURPLUS)), used) for n, used in zip(targets, drawn, strict=True)]
        parts = [self._build_one(name, p, share, n) for p, n in zip(blend.prefixes, prepared, strict=True)]
        return BlendedDataset(parts, indices)

    def _build_one(self, name: str, prefix: str, share: tuple[float, float], count: int | None) -> GPTDataset:
        indexed = IndexedDataset(prefix, not self.data.no_mmap_bin_files, self.data.data_cache_path)
        check_vocabulary(indexed, self.tokenizer, self.format.vocab_size)
        first, last = sequences_of(indexed, share)
        if first >= last:
            raise DataError(
                f"The {name} split of {prefix} is needed but empty: --split {self.data.split} of its {len(indexed)} "
                f"sequences leaves it none. Cut the corpus into more documents (text files by megatron-samoe preprocess "
                f"--document-kb or --document-separator), change --split, or give --{name}-data-path."
            )
        try:
            return GPTDataset(indexed, first, last, count, self.seeds[name], self.format, self._cache(prefix))
        except DataError as error:
            raise DataError(f"The {name} split of {prefix} cannot be used. {error}") from error

    def _cache(self, prefix: str) -> str | None:
        if self.data.data_cache_path is not None or is_remote(prefix):
            return self.data.data_cache_path
        return os.path.join(os.path.dirname(prefix) or ".", "index_cache")

    def _check_one_tokenizer(self, prefixes: tuple[str, ...]) -> None:
        """Raises DataError when the manifests of a blend name different tokenizers."""
        prints = {p: m.tokenizer_fingerprint for p in prefixes if (m := manifest.read(p)) is not None}
        if len(set(prints.values())) > 1:
            listing = ", ".join(f"{prefix} ({value[:12]})" for prefix, value in prints.items())
            raise DataError(
                f"The datasets of one blend were made with different tokenizers: {listing}. Make them anew with one "
                "(megatron-samoe preprocess), or leave out those of another."
            )


def sequences_of(indexed: IndexedDataset, share: tuple[float, float]) -> tuple[int, int]:
    """Returns the first sequence of a share of a dataset, and the one after its last."""
    first, last = (round(bound * float(len(indexed))) for bound in share)
    return first, last


def check_vocabulary(indexed: IndexedDataset, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises DataError if the data were visibly made with another tokenizer.

    The manifest of the data says so at once. Without one, up to SCAN_BYTES spread over the data are searched
    for ids outside the vocabulary; reading checks every id again.
    """
    record = manifest.read(indexed.path_prefix)
    if record is not None and record.tokenizer_fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{indexed.path_prefix} was made with another tokenizer ({record.tokenizer_type}, {record.vocab_size} entries, "
            f"fingerprint {record.tokenizer_fingerprint[:12]}) than the one of this run ({tokenizer.vocab_size} entries, "
            f"fingerprint {tokenizer.fingerprint[:12]}). Give the tokenizer that made it (--tokenizer-type "
            f"{record.tokenizer_type} with its files), or make a dataset of the text with this run's (megatron-samoe preprocess)."
        )
    if indexed.dtype.kind not in "iu":
        raise DataError(f"{indexed.path_prefix} holds {indexed.dtype} values, which are not token ids.")
    top = record.max_token_id if record is not None else _largest_id(indexed)
    if top >= vocab_size:
        raise DataError(
            f"{indexed.path_prefix} holds token id {top}, outside the vocabulary of {vocab_size}: it was made with another "
            "tokenizer, or --vocab-size is too small. Give the tokenizer that made it (--tokenizer-type and its files), or a "
            f"--vocab-size of {top + 1} or more."
        )


def _largest_id(indexed: IndexedDataset) -> int:
    if is_remote(indexed.path_prefix):
        return -1
    itemsize, num_bytes = indexed.dtype.itemsize, indexed.bin_reader.num_bytes
    num_items = num_bytes // itemsize
    block = (1 << 20) // itemsize
    num_blocks = min(-(-num_items // block), SCAN_BYTES >> 20)
    largest = -1
    for number in range(num_blocks):
        start = min(number * num_items // num_blocks, max(num_items - block, 0))
        values = indexed.bin_reader.read(indexed.dtype, min(block, num_items - start), start * itemsize)
        largest = max(largest, int(values.max(initial=0)))
    return largest
