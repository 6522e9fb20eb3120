"""From datasets to the micro-batches of each step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from megatron_samoe.config.validate import global_batch_size
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.datasets.build import build_train_valid_test_datasets
from megatron_samoe.datasets.samplers import PretrainingRandomSampler, PretrainingSampler
from megatron_samoe.datasets.tokenizer import Tokenizer
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.training.train_step import Batch


@dataclass(frozen=True)
class RunData:
    """The datasets of a run; `valid` is None without evaluation."""

    train: Any
    valid: Any
    config: PretrainConfig
    parallel: ParallelState

    def train_batches(self, consumed_samples: int) -> Iterator[list[Batch]]:
        """Yields for each step this rank's micro-batches, from where a run stands."""
        training, dp = self.config.training, self.parallel.dp
        per_step = self._batch_size // (training.micro_batch_size * dp.size)
        micro_batches = self._micro_batches(self.train, consumed_samples)
        while batches := list(islice(micro_batches, per_step)):
            yield batches

    def valid_batches(self) -> Iterator[Batch]:
        """Yields this rank's micro-batches of one evaluation: always the first samples of the validation split."""
        training = self.config.training
        per_step = self._batch_size // (training.micro_batch_size * self.parallel.dp.size)
        sampler = PretrainingSampler(
            len(self.valid), 0, training.micro_batch_size, self.parallel.dp.rank, self.parallel.dp.size
        )
        for indices in islice(sampler, training.eval_iters * per_step):
            yield self._to_device(self.valid.get_batch(indices))

    @property
    def _batch_size(self) -> int:
        return global_batch_size(self.config, self.parallel.world_size)

    def _micro_batches(self, dataset: Any, consumed_samples: int) -> Iterator[Batch]:
        training, dp = self.config.training, self.parallel.dp
        place = (training.micro_batch_size, dp.rank, dp.size)
        if self.config.data.dataloader_type == "cyclic":
            sampler = PretrainingRandomSampler(len(dataset), consumed_samples, *place, training.seed)
        else:
            sampler = PretrainingSampler(len(dataset), consumed_samples, *place)
        for indices in sampler:
            yield self._to_device(dataset.get_batch(indices))

    def _to_device(self, batch: Batch) -> Batch:
        device = self.parallel.device
        if device.type == "cpu":
            return batch
        return {name: t.pin_memory().to(device, non_blocking=True) for name, t in batch.items()}


def build_run_data(config: PretrainConfig, tokenizer: Tokenizer, parallel: ParallelState, is_builder: bool) -> RunData:
    """Returns the datasets of a run, with enough samples for all its steps.

    Args:
        is_builder: whether this rank writes sample indices that other ranks of its host wait for.
    """
    training = config.training
    batch = global_batch_size(config, parallel.world_size)
    counts = (training.train_iters * batch, training.eval_iters * batch, 0)
    train, valid, _ = build_train_valid_test_datasets(
        config.data, counts, config.model.seq_length, training.seed, tokenizer,
        barrier=parallel.world.barrier if parallel.world_size > 1 else None, is_builder=is_builder,
    )  # fmt: skip
    return RunData(train, valid, config, parallel)

