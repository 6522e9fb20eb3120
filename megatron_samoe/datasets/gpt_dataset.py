"""Training samples of a GPT model, in Megatron-core's order: tokens, labels, loss mask, position ids."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_samoe.datasets import index_cache, index_format, sample_index
from megatron_samoe.datasets.indexed_dataset import IndexedDataset
from megatron_samoe.datasets.mapped_file import require_whole
from megatron_samoe.errors import DataError

Sample = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SampleFormat:
    """The form of samples, whatever data they are cut from."""

    seq_length: int
    eod: int
    vocab_size: int
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False


class GPTDataset(torch.utils.data.Dataset):
    """Samples of `seq_length` tokens cut from sequences [first, last) of an indexed dataset.

    `dataset[i]` is a dict of "tokens", "labels", "position_ids" (int64 [S]) and "loss_mask" (float32 [S]), and
    with reset_attention_mask "document_ids" (int32 [S]: the number of end-of-document tokens in front).
    `dataset.get_batch(indices)` is the same stacked to [B, S], faster. tokens and labels share memory.

    Args:
        indexed_dataset: the data.
        first, last: the sequences of this split.
        num_samples: how many are needed (the data are repeated for them); None for one epoch.
        seed: of the order.
        sample_format: see SampleFormat.
        cache_path: folder for the indices; None keeps them in memory.

    Raises:
        DataError: the split is empty or shorter than one sample; at reading, a token id outside the vocabulary, or a
            file that was cut short.
    """

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        first: int,
        last: int,
        num_samples: int | None,
        seed: int,
        sample_format: SampleFormat,
        cache_path: str | None = None,
    ):
        self.dataset, self.format = indexed_dataset, sample_format
        lengths = indexed_dataset.sequence_lengths[first:last]
        #: Tokens of the sequences, each once.
        self.num_tokens = int(lengths.sum(dtype=np.int64))
        self.plan = sample_index.plan_epochs(self.num_tokens, num_samples, sample_format.seq_length)

        def build() -> index_cache.Arrays:
            random_state = np.random.RandomState(seed)
            documents = sample_index.build_document_index(first, last, self.plan, random_state)
            samples = sample_index.build_sample_index(
                indexed_dataset.sequence_lengths, documents, sample_format.seq_length, self.plan.num_samples
            )
            return documents, samples, sample_index.build_shuffle_index(self.plan, random_state)

        key = {
            "kind": "GPTDataset",
            "lengths": index_cache.content_key(lengths) if cache_path else "",
            "first": first,
            "num_samples": num_samples,
            "seq_length": sample_format.seq_length,
            "seed": seed,
        }
        self.document_index, self.sample_index, self.shuffle_index = index_cache.load_or_build(cache_path, key, build)
        self._gather = _Gatherer(self)

    def __len__(self) -> int:
        return self.plan.num_samples

    def __getitem__(self, index: int) -> Sample:
        return make_sample(self.get_tokens((index,)).view(-1), self.format)

    def get_batch(self, indices: Sequence[int]) -> Sample:
        """Returns the samples `indices` stacked: each value is [B, S]."""
        return make_sample(self.get_tokens(indices), self.format)

    def get_tokens(self, indices: Sequence[int]) -> torch.Tensor:
        """Returns the raw tokens of the samples, int64 [B, S + 1]."""
        outside = [index for index in indices if not 0 <= index < len(self)]
        if outside:
            raise IndexError(f"sample {outside[0]} of {len(self)}")
        require_whole(*self._gather.mapped)
        text, low, high = self._gather([int(self.shuffle_index[index]) for index in indices])
        if low < 0 or high >= self.format.vocab_size:
            raise DataError(
                f"{self.dataset.path_prefix} holds token id {low if low < 0 else high}, outside the vocabulary of "
                f"{self.format.vocab_size}: the data were made with another tokenizer. Give that one (--tokenizer-type and its files)."
            )
        return text

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_gather"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._gather = _Gatherer(self)


class _Gatherer:
    """Copies the tokens of samples out of an indexed dataset: compiled over memory maps, numpy otherwise."""

    def __init__(self, owner: GPTDataset):
        self._owner = owner
        #: An array of each file that samples are read from without a look at its size.
        self.mapped = [owner.shuffle_index]
        self._tensors: list[torch.Tensor] | None = None
        self._dtype_code = index_format.dtype_code(owner.dataset.dtype)
        ops = sample_index._compiled()
        buffer = getattr(owner.dataset.bin_reader, "buffer", None)
        if ops is not None and buffer is not None and owner.dataset.dtype.kind in "iu":
            self._tensors = sample_index.tensors(
                buffer,
                owner.dataset.sequence_pointers,
                owner.dataset.sequence_lengths,
                owner.document_index,
                owner.sample_index,
            )
            self.mapped += [buffer, owner.dataset.sequence_lengths]
            self._op = ops.gather_samples.default

    def __call__(self, numbers: list[int]) -> tuple[torch.Tensor, int, int]:
        """Returns the tokens of samples (numbers after the shuffle), int64 [B, S + 1], their smallest and largest."""
        owner = self._owner
        out = torch.empty((len(numbers), owner.format.seq_length + 1), dtype=torch.int64)
        if self._tensors is None:
            rows = out.numpy()
            for row, number in zip(rows, numbers, strict=True):
                self._fill(row, number)
            return out, int(rows.min(initial=0)), int(rows.max(initial=0))
        try:
            low, high = self._op(*self._tensors, numbers, self._dtype_code, out)
        except RuntimeError as error:
            raise DataError(
                f"{owner.dataset.path_prefix}: one of the samples is outside the data. The index, the data or the "
                "cached sample index is damaged."
            ) from error
        return out, low, high

    def _fill(self, row: np.ndarray, sample: int) -> None:
        owner = self._owner
        (position, offset), (end_position, end_offset) = owner.sample_index[sample : sample + 2].tolist()
        filled = 0
        for place in range(position, end_position + 1):
            length = end_offset + 1 - offset if place == end_position else None
            part = owner.dataset.get(int(owner.document_index[place]), offset, length)
            row[filled : filled + len(part)] = part
            filled, offset = filled + len(part), 0
        if filled != len(row):
            raise DataError(f"Sample {sample} has {filled} tokens, not {len(row)}: the sample index is damaged.")


@functools.lru_cache(maxsize=8)
def _positions(seq_length: int) -> torch.Tensor:
    return torch.arange(seq_length, dtype=torch.int64)


def make_sample(text: torch.Tensor, sample_format: SampleFormat) -> Sample:
    """Returns the model's inputs from raw tokens [..., S + 1]: each value is [..., S].

    tokens and labels are views of `text`, position_ids may be shared between samples: do not write to them.
    """
    seq_length = sample_format.seq_length
    tokens, labels = text.narrow(-1, 0, seq_length), text.narrow(-1, 1, seq_length)
    position_ids, loss_mask = _positions(seq_length), torch.ones(tokens.shape)
    if text.dim() > 1:
        position_ids = position_ids.expand_as(tokens)
    sample = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": position_ids}
    if not (sample_format.reset_position_ids or sample_format.reset_attention_mask or sample_format.eod_mask_loss):
        return sample
    is_eod = tokens == sample_format.eod
    if sample_format.eod_mask_loss:
        loss_mask.masked_fill_(is_eod, 0.0)
    if sample_format.reset_position_ids:
        # A position counts from the token after the last end-of-document token in front of it.
        restarts = torch.zeros(tokens.shape, dtype=torch.int64)
        restarts[..., 1:] = torch.where(is_eod[..., :-1], position_ids[..., 1:], 0)
        sample["position_ids"] = position_ids - restarts.cummax(dim=-1).values
    if sample_format.reset_attention_mask:
        document_ids = torch.zeros(tokens.shape, dtype=torch.int32)
        document_ids[..., 1:] = is_eod[..., :-1].cumsum(dim=-1)
        sample["document_ids"] = document_ids
    return sample


class MockGPTDataset(torch.utils.data.Dataset):
    """Random tokens of the same shape as real samples; sample i of a seed is always the same."""

    def __init__(self, num_samples: int, seed: int, sample_format: SampleFormat):
        self.num_samples, self.seed, self.format = num_samples, seed, sample_format
        #: Tokens of all samples.
        self.num_tokens = num_samples * sample_format.seq_length

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        return {name: value[0] for name, value in self.get_batch([index]).items()}

    def get_batch(self, indices: Sequence[int]) -> Sample:
        """Returns the samples `indices` stacked: each value is [B, S]."""
        shape = self.format.seq_length + 1
        rows = [
            np.random.default_rng([self.seed, int(i)]).integers(self.format.vocab_size, size=shape) for i in indices
        ]
        return make_sample(torch.from_numpy(np.stack(rows)), self.format)
