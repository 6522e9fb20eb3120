"""The checkpoint of a teacher: which it is, and whether it can teach."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_samoe.config.checkpoint import CheckpointConfig
from megatron_samoe.config.cli import from_mapping
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.teacher import on_ranks_of
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class SavedTeacher:
    """A checkpoint whose model teaches.

    Attributes:
        trained: the configuration that it was trained with.
        parts: of its model, that came from outside the package.
    """

    directory: Path
    trained: PretrainConfig
    vocab_size: int
    parts: dict[str, Any]

    def on_ranks_of(self, student: PretrainConfig, vocab_size: int, world_size: int) -> PretrainConfig:
        """Returns the configuration in which it runs with a student: see `config.teacher.on_ranks_of`.

        Raises:
            ConfigError: its vocabulary is another, or its model does not fit the student's layout or sequences.
        """
        if self.vocab_size != vocab_size:
            raise ConfigError(
                "--teacher",
                student.distillation.teacher,
                f"has a vocabulary of {self.vocab_size} entries; it must be the student's, which has {vocab_size}",
            )
        return on_ranks_of(student, self.trained, world_size)


def find_teacher(folder: str, problems_of: store.Problems = lambda _: []) -> SavedTeacher:
    """Returns the newest whole checkpoint in the folder of a run, of checkpoints, or of one checkpoint.

    Args:
        problems_of: as in `store.find_checkpoint`.

    Raises:
        CheckpointError: it is missing, or all are damaged.
    """
    store.refuse_without_checkpoint(folder, "--teacher")
    directory = store.find_checkpoint(CheckpointConfig(load=folder), problems_of)
    if directory is None:
        raise CheckpointError(f"--teacher {folder} has no checkpoint.", collective=True)
    saved = store.read_train_state(directory, ("vocab_size",))
    trained = from_mapping(store.read_config(directory), str(directory / store.CONFIG))
    return SavedTeacher(directory, trained, saved["vocab_size"], saved.get(store.PARTS) or {})


def teacher_of(student: PretrainConfig) -> PretrainConfig | None:
    """Returns the configuration of the teacher whose model a layout must fit as well; None without one.

    Ranks may not agree whether the teacher has left, so it counts while its folder is there.
    """
    folder = student.distillation.teacher
    if folder is None or student.training.skip_train:
        return None
    with contextlib.suppress(CheckpointError):
        return find_teacher(folder).trained
    return None
