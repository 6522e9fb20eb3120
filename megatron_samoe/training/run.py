"""A run as a value: `resolve` makes all that training needs, each part once and in order, and `train` trains with it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_samoe.config.cli import Asked, OptionSource
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.training import DistillationConfig
from megatron_samoe.config.words import in_python_words
from megatron_samoe.datasets.carried_tokenizer import Vocabulary, vocabulary_of
from megatron_samoe.errors import ConfigError, MegatronSamoeError
from megatron_samoe.log import configure_logging, logger
from megatron_samoe.models.rank_model import RankModel
from megatron_samoe.parallel_state import backend, launcher
from megatron_samoe.parallel_state.meeting import Meeting
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.runtime import kernels
from megatron_samoe.runtime.ranks import prepare_device, state_in_layout
from megatron_samoe.training.batches import RunData, build_run_data
from megatron_samoe.training.hook import Hook, Record, Training, refuse_strange
from megatron_samoe.training.hooks import default_hooks
from megatron_samoe.training.machine import alike_facts
from megatron_samoe.training.preflight import preflight
from megatron_samoe.training.resume import Start, find_start, on_ranks
from megatron_samoe.training.setup import Extensions, build_setup, describe, naming_memory
from megatron_samoe.training.teacher import refuse_unfit
from megatron_samoe.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that one rank needs to train, except the model.

    Attributes:
        config: legal on these ranks, with the steps and the checkpoint of this start.
        said: who said an option, "file", "checkpoint" or "flag"; nobody did where it has its default or follows from others.
        parallel: this rank's parallel state.
        kernels: what it computes with, from here on.
        extensions: what comes from outside the package.
        meeting: this rank's part in torchrun's job; None without one.
    """

    config: PretrainConfig
    said: Mapping[str, OptionSource]
    parallel: ParallelState
    start: Start
    vocabulary: Vocabulary
    kernels: kernels.Kernels
    data: RunData
    extensions: Extensions | None
    meeting: Meeting | None

    @property
    def in_memory(self) -> PretrainConfig:
        """The configuration of what ranks hold: without a teacher that has left."""
        return self.config if self.start.is_taught else replace(self.config, distillation=DistillationConfig())


def resolve(asked: Asked, extensions: Extensions | None = None) -> Run | None:
    """Returns the run that is asked for, on the ranks of this torchrun job or in this process only; all ranks call it
    together. On a rank that the layout does not use it returns None, once the others have trained.
    """
    with backend.telling_other_hosts():
        world_size = launcher.world_size()
        asked, config, num_ranks = on_ranks(asked, world_size)
        device = prepare_device(config.parallel, config.training.num_threads, config.training.bf16)
        if device.type == "cpu":
            backend.keep_freed_memory()
        if config.training.fp16 and device.type != "cuda":
            raise ConfigError("--fp16", True, "needs a CUDA device; use --bf16 or fp32 on a CPU")
    facts = alike_facts(config, device) if world_size > launcher.local_world_size() else {}
    meeting = backend.initialize_distributed(config.parallel, device, num_ranks, facts)
    with backend.shared_fate(meeting):
        if meeting is not None and not dist.is_initialized():
            meeting.stand_by()
            return None
        parallel = state_in_layout(config.parallel, device, config.moe.shares_experts)
        config, start = find_start(config, parallel)
        chosen = kernels.choose(parallel, start.kernels)
        vocabulary = vocabulary_of(config)
        if start.is_taught:
            refuse_unfit(config, vocabulary.size, parallel.world_size, (extensions or Extensions()).parts)
        data = build_run_data(config, vocabulary.tokenizer, parallel, (start.iteration, start.samples))
    return Run(
        config=config,
        said=asked.said,
        parallel=parallel,
        start=start,
        vocabulary=vocabulary,
        kernels=chosen,
        data=data,
        extensions=extensions,
        meeting=meeting,
    )


def train(run: Run, hooks: Sequence[Hook] = ()) -> Trainer:
    """Trains, and returns the trainer with the last state and model; all ranks of the run call it together.

    Args:
        hooks: to be called after the configuration's own.
    """
    config, parallel, vocab_size = run.config, run.parallel, run.vocabulary.size
    with backend.shared_fate(run.meeting):
        if config.parallel.preflight:
            preflight(run.in_memory, vocab_size, parallel)
        with naming_memory(run.in_memory, vocab_size, parallel):
            setup = build_setup(config, vocab_size, parallel, extensions=run.extensions)
        describe(setup)
        logger.info(run.data.summary())
        setup = replace(setup, attachments=run.vocabulary.files)
        trainer = Trainer(setup, run.data, [*default_hooks(config), *hooks])
        trainer.run()
        if run.meeting is not None and parallel.rank == 0:
            run.meeting.finish(parallel.world_size)
    return trainer


@dataclass(frozen=True)
class Pretrained:
    """The results of a run.

    Attributes:
        records: of its logged steps and evaluations, as in metrics.jsonl.
        folder: of what it saved, `run_dir` or else `save`; None where it had neither.
        model: with the last weights; of several ranks each has its part. None on a rank that the layout did not use.
    """

    records: tuple[Record, ...]
    folder: Path | None
    model: RankModel | None


class _Records(Hook):
    """Keeps all records."""

    def __init__(self) -> None:
        self.kept: list[Record] = []

    def record(self, run: Training, record: Record) -> None:
        self.kept.append(dict(record))

    def evaluated(self, run: Training, record: Record) -> None:
        self.record(run, record)


def pretrain(
    config: PretrainConfig | Mapping[str, Any], hooks: Sequence[Hook] = (), extensions: Extensions | None = None
) -> Pretrained:
    """Trains as the command `megatron-samoe pretrain` does, in this process, or on all ranks of the torchrun job that it is
    part of, which call it together.

    A signal, such as a notebook's interrupt, ends the run after its step, saved.

    Args:
        config: a configuration, or options by name, `{"num_layers": 4, "mock_data": True}`, as a YAML file has them.
        hooks: to be called after the configuration's own.
        extensions: parts of the model and rules of the optimizer that come from outside the package.

    Raises:
        TypeError: an argument is of another kind.
        ConfigError: the configuration is not legal on these ranks.
        DataError, CheckpointError, NonFiniteLossError, CommunicationError: as the command reports them.
    """
    if not isinstance(config, (PretrainConfig, Mapping)):
        raise TypeError(f"config must be a PretrainConfig or a mapping of options, not {type(config).__name__}")
    refuse_strange(hooks)
    if not logger.handlers:
        configure_logging(launcher.rank())
    records, was_joined = _Records(), dist.is_initialized()
    try:
        with in_python_words():
            run = resolve(Asked.of(config), extensions)
            trainer = None if run is None else train(run, [*hooks, records])
    finally:
        if dist.is_initialized() and not was_joined and isinstance(sys.exc_info()[1], (MegatronSamoeError, type(None))):
            backend.leave_distributed()
    if run is None or trainer is None:
        return Pretrained((), None, None)
    folder = run.config.logging.run_dir or run.config.checkpoint.save
    return Pretrained(tuple(records.kept), None if folder is None else Path(folder), trainer.setup.model)
