"""The samples that an evaluation goes through, each once, and the dataset of a blend that each comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from megatron_samoe.datasets.blended_dataset import BlendedDataset
from megatron_samoe.datasets.gpt_dataset import GPTDataset, MockGPTDataset, Sample


class EvaluationSet:
    """The first samples of a validation or test dataset, filled up to whole batches of all ranks.

    What fills up is masked: it counts in no loss.

    Args:
        num_samples: how many are evaluated; all if not given.
        multiple_of: samples that all data-parallel ranks take at once.
    """

    def __init__(
        self, dataset: GPTDataset | BlendedDataset | MockGPTDataset, num_samples: int | None, multiple_of: int
    ):
        self.dataset = dataset
        self.num_samples = len(dataset) if num_samples is None else num_samples
        self.padded_samples = -(-self.num_samples // multiple_of) * multiple_of
        #: Names of a blend's datasets; none where there is one dataset.
        self.names: tuple[str, ...] = ()
        if isinstance(dataset, BlendedDataset) and len(dataset.datasets) > 1:
            self.names = _distinct([part.dataset.path_prefix for part in dataset.datasets])

    def __len__(self) -> int:
        return self.padded_samples

    def get_batch(self, indices: Sequence[int]) -> Sample:
        """Returns samples, stacked to [B, S]; an index past the last gives the last, with a loss mask of zeros. Of several
        datasets also "dataset_ids", int64 [B]."""
        last = self.num_samples - 1
        batch = dict(self.dataset.get_batch([min(index, last) for index in indices]))
        is_padding_B = torch.tensor([index > last for index in indices])
        if is_padding_B.any():
            batch["loss_mask"] = batch["loss_mask"].masked_fill(is_padding_B[:, None], 0.0)
        if self.names:
            assert isinstance(self.dataset, BlendedDataset)
            batch["dataset_ids"] = torch.tensor([self.dataset.locate(min(index, last))[0] for index in indices])
        return batch


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Returns names with a number behind those that stand more than once."""
    total, seen = Counter(names), Counter[str]()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if total[name] == 1 else f"{name} ({seen[name]})")
    return tuple(distinct)
