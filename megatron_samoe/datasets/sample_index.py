"""The order of training samples: pure arithmetic, equal to Megatron-core's for the same seed and sizes.

One `numpy.random.RandomState(seed)` first shuffles the sequences of all epochs together (the last epoch apart
when fewer than 80 % of its samples are used), then the samples. The shuffled sequences are laid end to end and
cut every `seq_length` tokens; a sample is `seq_length + 1` tokens, so neighbours share one.

Every function has two bodies: C++ when the compiled extension is there, numpy otherwise; same results.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_samoe.errors import DataError

_MOST_SAMPLES = 1 << 36
# Below this share of its samples in use, the last epoch is shuffled apart (Megatron's threshold).
SEPARATE_FINAL_EPOCH_BELOW = 0.80


#: The dataset of each sample (int16), and the sample's number there (int64).
BlendIndex = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class EpochPlan:
    """How often a split is read, and how its shuffles are arranged."""

    num_epochs: int
    num_samples: int
    """Samples that exist: at least the number that was asked for."""
    separate_final_epoch: bool
    num_samples_before_final_epoch: int
    """Samples of the first shuffle range; all of them unless the final epoch is apart."""


def plan_epochs(tokens_per_epoch: int, num_samples: int | None, seq_length: int) -> EpochPlan:
    """Returns the plan for at least `num_samples` samples; None asks for what one epoch holds.

    Raises DataError when one epoch is shorter than one sample.
    """
    if tokens_per_epoch < seq_length + 1:
        raise DataError(
            f"The data hold {tokens_per_epoch} tokens, fewer than one sample of {seq_length} + 1. "
            "Add data, give this split a larger share, or lower --seq-length."
        )
    if num_samples is None:
        num_epochs = 1
    else:
        num_epochs = max(1, -(-(num_samples * seq_length + 1) // tokens_per_epoch))
    total = (num_epochs * tokens_per_epoch - 1) // seq_length
    if total > _MOST_SAMPLES:
        raise DataError(f"{num_samples} samples are asked for, more than the {_MOST_SAMPLES:,} that an index can have.")
    if num_epochs == 1:
        return EpochPlan(1, total, False, total)
    assert num_samples is not None
    before_final = ((num_epochs - 1) * tokens_per_epoch - 1) // seq_length
    per_epoch = (tokens_per_epoch - 1) // seq_length
    separate = num_samples - before_final < int(SEPARATE_FINAL_EPOCH_BELOW * per_epoch)
    return EpochPlan(num_epochs, total, separate, before_final if separate else total)


def build_document_index(first: int, last: int, plan: EpochPlan, random_state: np.random.RandomState) -> np.ndarray:
    """Returns the shuffled sequence numbers [first, last) of all epochs, int32 [num_epochs * (last - first)]."""
    count = last - first
    index = np.empty(plan.num_epochs * count, dtype=np.int32)
    epochs = index.reshape(plan.num_epochs, count)
    for start in range(0, count, 1 << 20):  # in pieces: a second array of this size would be the peak of memory
        stop = min(start + (1 << 20), count)
        epochs[:, start:stop] = np.arange(first + start, first + stop, dtype=np.int32)
    _shuffle_parts(index, len(index) - count if plan.separate_final_epoch else len(index), random_state)
    return index


def _shuffle_parts(index: np.ndarray, first: int, random_state: np.random.RandomState) -> None:
    """Shuffles the samples before an index, and then the rest."""
    shuffle(index[:first], random_state)
    if first != len(index):
        shuffle(index[first:], random_state)


def build_shuffle_index(plan: EpochPlan, random_state: np.random.RandomState) -> np.ndarray:
    """Returns the order in which samples are read, uint32 [num_samples] (int64 where uint32 is too small)."""
    total = plan.num_samples
    index = np.arange(total, dtype=np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64)
    _shuffle_parts(index, plan.num_samples_before_final_epoch, random_state)
    return index


def build_sample_index(
    sequence_lengths: np.ndarray, document_index: np.ndarray, seq_length: int, num_samples: int
) -> np.ndarray:
    """Returns where each sample starts: [num_samples + 1, 2] of (position in document_index, token offset).

    int32, or int64 where a column needs it. Sequence lengths are int32, none negative (DataError).
    """
    wide = len(document_index) > np.iinfo(np.int32).max
    out = np.empty((num_samples + 1, 2), dtype=np.int64 if wide else np.int32)
    ops = _compiled()
    if ops is not None:
        lengths, documents, target = tensors(sequence_lengths, document_index, out)
        try:
            ops.build_sample_index(lengths, documents, seq_length, target)
        except RuntimeError as error:
            raise DataError(f"The index of the dataset is damaged: {str(error).splitlines()[0]}.") from error
        return out
    ends = np.cumsum(sequence_lengths[document_index], dtype=np.int64)
    if len(ends) and (np.diff(ends) < 0).any():
        raise DataError("A sequence has a negative length: the index of the dataset is damaged.")
    starts = np.arange(num_samples + 1, dtype=np.int64) * seq_length
    position = np.searchsorted(ends, starts, side="right")
    out[:, 0] = position
    out[:, 1] = starts - (ends[position] - sequence_lengths[document_index[position]])
    # The very first sample starts at the first sequence even if that one is empty.
    out[0] = 0
    return out


def build_blending_indices(weights: np.ndarray, size: int) -> BlendIndex:
    """Returns for each of `size` samples its dataset (int16) and the number of the sample there (int64).

    Greedy: each sample goes to the dataset that is furthest behind its weight, the first on ties. `weights` is
    float64 and sums to 1.
    """
    weights = np.ascontiguousarray(weights, dtype=np.float64)
    return _blend(weights, np.full(len(weights), size, dtype=np.int64), size)


def build_exhaustive_blending_indices(sizes: np.ndarray) -> BlendIndex:
    """Returns the same as build_blending_indices, drawing exactly sizes[i] samples from dataset i."""
    sizes = np.ascontiguousarray(sizes, dtype=np.int64)
    total = int(sizes.sum())
    return _blend(sizes / float(total), sizes, total)


def _blend(weights: np.ndarray, limits: np.ndarray, total: int) -> BlendIndex:
    dataset_index, dataset_sample_index = np.empty(total, dtype=np.int16), np.empty(total, dtype=np.int64)
    ops = _compiled()
    if ops is not None:
        ops.build_blending_index(*tensors(weights, limits, dataset_index, dataset_sample_index))
        return dataset_index, dataset_sample_index
    counts = np.zeros(len(weights), dtype=np.int64)
    for sample in range(len(dataset_index)):
        behind = weights * max(float(sample), 1.0) - counts
        behind[counts >= limits] = -np.inf
        chosen = int(behind.argmax())
        dataset_index[sample], dataset_sample_index[sample] = chosen, counts[chosen]
        counts[chosen] += 1
    return dataset_index, dataset_sample_index


def shuffle(values: np.ndarray, random_state: np.random.RandomState) -> None:
    """Shuffles 4- or 8-byte `values` in place exactly as `random_state.shuffle` does, and advances its state equally.

    The compiled version draws the swaps of a window ahead and prefetches them: numpy waits for memory at each.
    """
    ops = _compiled()
    if ops is None or values.dtype.itemsize not in (4, 8) or not values.flags.c_contiguous:
        random_state.shuffle(values)
        return
    state = random_state.get_state(legacy=False)
    key = np.ascontiguousarray(state["state"]["key"], dtype=np.uint32)
    signed = values.view(np.int32 if values.dtype.itemsize == 4 else np.int64)
    position = ops.shuffle_legacy(*tensors(signed, key.view(np.int32)), int(state["state"]["pos"]))
    state["state"] = {"key": key, "pos": int(position)}
    random_state.set_state(state)


def _compiled() -> Any:
    """Returns the compiled ops of this module, or None if they are not built."""
    from megatron_samoe.ops import extension

    if not extension.load():
        return None
    import torch

    ops = torch.ops.megatron_samoe
    return ops if hasattr(ops, "build_sample_index") else None


def tensors(*arrays: np.ndarray) -> list[Any]:
    """Returns arrays as tensors of the same memory, for ops that only read what cannot be written."""
    import torch

    with warnings.catch_warnings():
        # Torch remarks that a mapped file cannot be written.
        warnings.simplefilter("ignore", UserWarning)
        return [torch.from_numpy(array) for array in arrays]
