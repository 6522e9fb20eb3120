"""From datasets to the micro-batches of each step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from megatron_samoe.config.derived import batch_size_after, global_batch_size, samples_after
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.datasets.build import build_train_valid_test_datasets
from megatron_samoe.datasets.evaluation_set import EvaluationSet
from megatron_samoe.datasets.loader import DataLoader
from megatron_samoe.datasets.samplers import PretrainingRandomSampler, PretrainingSampler
from megatron_samoe.datasets.tokenizer import Tokenizer
from megatron_samoe.errors import DataError
from megatron_samoe.parallel_state import launcher
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.training.micro_batches import Batch

#: Seed of validation and test samples: which they are must not depend on a run's --seed.
EVALUATION_SEED = 1234


@dataclass(frozen=True)
class RunData:
    """The datasets of a run: `train` is None without training, `valid` and `test` where they are not evaluated.

    Attributes:
        train_samples: that the run has read at its last step.
    """

    train: Any
    valid: EvaluationSet | None
    test: EvaluationSet | None
    config: PretrainConfig
    parallel: ParallelState
    train_samples: int = 0

    @property
    def epoch_samples(self) -> float | None:
        """Samples in which the training data pass once; None for a blend, whose datasets pass at rates of their own."""
        plan = getattr(self.train, "plan", None)
        return None if plan is None else plan.num_samples / plan.num_epochs

    def summary(self) -> str:
        """Returns how much there is to train on and to evaluate, and how much of it is read."""
        if self.config.data.mock_data:
            return "mock data: random tokens"
        seq_length, said = self.config.model.seq_length, []
        if self.train is not None:
            read = self.train_samples / self.epoch_samples if self.epoch_samples else None
            passes = "" if read is None else f" ({read:.3g} passes by the last step)"
            said.append(f"{self.train.num_tokens:,} tokens to train on{passes}")
        for name, data in (("validation", self.valid), ("test", self.test)):
            if data is not None:
                said.append(
                    f"{data.dataset.num_tokens:,} for {name} ({data.num_samples * seq_length:,} read each time)"
                )
        return f"data: {', '.join(said) or 'none'}"

    def train_batches(self, consumed_samples: int) -> Iterator[list[Batch]]:
        """Yields for each step this rank's micro-batches, from where a run is."""
        training, position = self.config.training, self._position
        if self.config.data.dataloader_type == "cyclic":
            sampler: Iterable[list[int]] = PretrainingRandomSampler(
                len(self.train), consumed_samples, *position, training.seed
            )
        else:
            sampler = PretrainingSampler(len(self.train), consumed_samples, *position)
        micro_batches = iter(DataLoader(self.train, sampler, self.config.data.num_workers, transform=self._pin))
        per_pass = training.micro_batch_size * self.parallel.dp.size
        while True:
            size = batch_size_after(self.config, self.parallel.world_size, consumed_samples)
            batches = [self._to_device(batch) for batch in islice(micro_batches, size // per_pass)]
            if len(batches) < size // per_pass:
                raise DataError(
                    f"The training data end before the step after sample {consumed_samples}: {len(self.train)} samples are "
                    "there. Lower --train-iters, or give more data."
                )
            consumed_samples += size
            yield batches

    def evaluation_batches(self, data: EvaluationSet) -> Iterator[Batch]:
        """Yields this rank's micro-batches of one evaluation: always the same samples."""
        sampler = PretrainingSampler(len(data), 0, *self._position)
        for batch in DataLoader(data, sampler, self.config.data.num_workers, transform=self._pin):
            yield self._to_device(batch)

    @property
    def _position(self) -> tuple[int, int, int]:
        return self.config.training.micro_batch_size, self.parallel.dp.rank, self.parallel.dp.size

    def _pin(self, batch: Batch) -> Batch:
        return batch if self.parallel.device.type == "cpu" else {name: t.pin_memory() for name, t in batch.items()}

    def _to_device(self, batch: Batch) -> Batch:
        device = self.parallel.device
        # Documents are cut on the host, which attention's calls are made by.
        return {n: t if n == "document_ids" else t.to(device, non_blocking=True) for n, t in batch.items()}


def build_run_data(
    config: PretrainConfig, tokenizer: Tokenizer, parallel: ParallelState, done: tuple[int, int] = (0, 0)
) -> RunData:
    """Returns the datasets of a run, with enough samples for all its steps.

    Test data are evaluated where there are any: those of --test-data-path, or what --split leaves for them.

    Args:
        done: iterations and samples that the run has behind it, maybe with batches of another size.
    """
    training = config.training
    batch = global_batch_size(config, parallel.world_size)
    iterations, samples = done
    evaluated = None if training.full_validation else training.eval_iters * batch
    needed = samples_after(config, parallel.world_size, samples, max(training.train_iters - iterations, 0))
    train_samples = 0 if training.skip_train else max(needed, training.train_samples or 0)
    train, *held_out = build_train_valid_test_datasets(
        config.data,
        (train_samples, evaluated, evaluated),
        config.model.seq_length,
        training.seed,
        tokenizer,
        barrier=parallel.world.barrier if parallel.world_size > 1 else None,
        turn=0
        if parallel.rank == 0
        else 1
        if launcher.local_rank() == 0
        else 2,  # the first of a host builds for others
        evaluation_seed=EVALUATION_SEED,
        optional=_optional_splits(config),
    )
    step = training.micro_batch_size * parallel.dp.size
    sets = [None if data is None else EvaluationSet(data, evaluated, step) for data in held_out]
    return RunData(train, sets[0], sets[1], config, parallel, train_samples)


def _optional_splits(config: PretrainConfig) -> tuple[str, ...]:
    """Returns the splits that a run leaves out without data: test data unless asked for by name."""
    data = config.data
    if data.test_data_path:
        only_test = config.training.skip_train and not (data.data_path or data.valid_data_path or data.mock_data)
        return ("valid",) if only_test else ()
    return ("test",)
