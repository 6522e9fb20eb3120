"""Several datasets drawn from in given proportions, in the order of Megatron-core's BlendedDataset."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from megatron_samoe.datasets import index_cache, sample_index
from megatron_samoe.datasets.gpt_dataset import GPTDataset, make_sample
from megatron_samoe.datasets.mapped_file import require_whole
from megatron_samoe.errors import DataError
from megatron_samoe.parsing import JsonObject

MAX_DATASETS = 32766  # dataset numbers are stored as int16


def normalize(weights: Sequence[float]) -> np.ndarray:
    """Returns weights divided by their sum, float64."""
    values = np.array(weights, dtype=np.float64)
    return values / np.sum(values)


def blend_indices(
    weights: Sequence[float] | None, sizes: Sequence[int] | None, size: int | None, cache_path: str | None
) -> sample_index.BlendIndex:
    """Returns (dataset_index int16, dataset_sample_index int64), from the cache where possible.

    With `weights`, `size` samples in those proportions; else `size` samples in proportion to `sizes`, or, where
    `size` is None, every sample of every dataset once.
    """
    key: JsonObject
    if weights is None and size is None:
        assert sizes is not None
        key = {"kind": "exhaustive blend", "sizes": [int(s) for s in sizes]}
        build = partial(sample_index.build_exhaustive_blending_indices, np.array(sizes, dtype=np.int64))
    else:
        assert size is not None
        shares = normalize(weights if weights is not None else [float(s) for s in sizes or ()])
        key = {"kind": "blend", "weights": [w.hex() for w in shares.tolist()], "size": size}
        build = partial(sample_index.build_blending_indices, shares, size)
    dataset_index, dataset_sample_index = index_cache.load_or_build(cache_path, key, build)
    return dataset_index, dataset_sample_index


class BlendedDataset(torch.utils.data.Dataset):
    """The datasets joined in the order given by `blend_indices`.

    Raises DataError when a dataset is asked for more samples than it has.
    """

    def __init__(self, datasets: Sequence[GPTDataset], indices: sample_index.BlendIndex):
        if len(datasets) > MAX_DATASETS:
            raise DataError(f"A blend of {len(datasets)} datasets is too large; at most {MAX_DATASETS} are allowed.")
        self.datasets = list(datasets)
        self.dataset_index, self.dataset_sample_index = indices
        drawn = np.bincount(self.dataset_index, minlength=len(datasets))
        for number, (dataset, count) in enumerate(zip(self.datasets, drawn.tolist(), strict=True)):
            if count > len(dataset):
                raise DataError(f"The blend draws {count} samples from dataset {number}, which has {len(dataset)}.")

    def __len__(self) -> int:
        return len(self.dataset_index)

    @property
    def num_tokens(self) -> int:
        """Tokens of all datasets, each once."""
        return sum(dataset.num_tokens for dataset in self.datasets)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number, sample = self.locate(index)
        return self.datasets[number][sample]

    def locate(self, index: int) -> tuple[int, int]:
        """Returns (dataset number, sample number in it) of sample `index`."""
        require_whole(self.dataset_index)
        return int(self.dataset_index[index]), int(self.dataset_sample_index[index])

    def get_batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Returns the samples `indices` stacked: each value is [B, S]."""
        places = [self.locate(index) for index in indices]
        rows = [self.datasets[number].get_tokens((sample,)) for number, sample in places]
        return make_sample(torch.cat(rows), self.datasets[0].format)
