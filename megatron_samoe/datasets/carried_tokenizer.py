"""The tokenizer's files inside a checkpoint, so that a run can be moved, renamed and copied."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_samoe.config.data import DataConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.datasets.chat_template import chat_files
from megatron_samoe.datasets.tokenizer import MAX_TOKENIZER_BYTES, Tokenizer, tokenizer_of
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.errors import CheckpointError, ConfigError
from megatron_samoe.log import logger
from megatron_samoe.parsing import read_file

#: Folder in a checkpoint's, and the options that name files.
FOLDER = "tokenizer"
FIELDS = ("tokenizer_model", "vocab_file", "merge_file")


def read_files(data: DataConfig, checkpoint: Path | None = None) -> dict[str, bytes]:
    """Returns the files that a configuration names, by their path in a checkpoint; those that are not there are left out.

    With them come the files that say how their model talks, or those of the checkpoint that a run continues.
    """
    files: dict[str, bytes] = {} if checkpoint is None else chat_in(checkpoint)
    for field in FIELDS:
        path = getattr(data, field)
        if path is not None and os.path.isdir(path):
            path = os.path.join(path, "tokenizer.json")
        if path is not None and os.path.isfile(path):
            files |= chat_in(Path(path).parent, ".")
            files[f"{FOLDER}/{field}{Path(path).suffix}"] = read_file(path, MAX_TOKENIZER_BYTES)
    return files


def chat_in(directory: Path, folder: str = FOLDER) -> dict[str, bytes]:
    """Returns the files in a folder of a checkpoint that say how its model talks, by their path in a checkpoint."""
    return {f"{FOLDER}/{name}": content for name, content in chat_files(directory / folder).items()}


def chat_of(attachments: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns the files of `chat_in` among those that a checkpoint carries, by their path in a Hugging Face folder."""
    inner = {name.partition("/")[2]: content for name, content in attachments.items()}
    return {name: content for name, content in inner.items() if Path(name).stem not in FIELDS}


def files_in(directory: Path) -> dict[str, bytes]:
    """Returns the files that a checkpoint carries, by their path in it."""
    found = sorted((directory / FOLDER).iterdir()) if (directory / FOLDER).is_dir() else []
    try:
        return {f"{FOLDER}/{p.name}": read_file(p, MAX_TOKENIZER_BYTES) for p in found if p.stem in FIELDS}
    except OSError as error:
        raise CheckpointError(f"{directory / FOLDER} is damaged: {error.filename}: {error.strerror}.") from None


def with_carried(data: DataConfig, directory: Path, only_missing: bool = False) -> DataConfig:
    """Returns the configuration with a checkpoint's own files in place of those that it names.

    Args:
        only_missing: keep names of files that are there.
    """
    own: Mapping[str, str] = {Path(name).stem: str(directory / name) for name in files_in(directory)}
    changes = {
        field: path
        for field, path in own.items()
        if getattr(data, field) is not None and not (only_missing and os.path.exists(getattr(data, field)))
    }
    return replace(data, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a run, and its files.

    Attributes:
        files: of the tokenizer, by their path in a checkpoint that carries them.
        size: entries, at least the tokenizer's.
    """

    tokenizer: Tokenizer
    files: Mapping[str, bytes]
    size: int


def vocabulary_of(config: PretrainConfig) -> Vocabulary:
    """Returns the vocabulary of a run. A tokenizer whose files are gone is the one that the checkpoint to load carries.

    Raises:
        ConfigError: --vocab-size is less than the tokenizer's.
        DataError: a tokenizer's file is missing or damaged.
    """
    data = config.data
    directory = None if config.checkpoint.load is None else store.find_checkpoint(config.checkpoint)
    if directory is not None:
        data = with_carried(data, directory, only_missing=True)
        gone = [getattr(config.data, name) for name in FIELDS if getattr(data, name) != getattr(config.data, name)]
        if gone:
            logger.info(f"the tokenizer is the one that {directory} carries, instead of {' and '.join(gone)}")
    tokenizer = tokenizer_of(data)
    size = data.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise ConfigError("--vocab-size", size, f"must be at least the tokenizer's {tokenizer.vocab_size} entries")
    return Vocabulary(tokenizer, read_files(data, directory), size)
