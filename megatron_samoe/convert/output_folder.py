"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_samoe.dist_checkpointing.saving import fsync_dir
from megatron_samoe.errors import CheckpointError, in_units

#: Room that is left for the file system's own needs.
SPARE_BYTES = 32 << 20


def require_new(directory: Path) -> None:
    """Raises CheckpointError where something exists, or a folder cannot be made."""
    try:
        if directory.is_dir() and not any(directory.iterdir()):
            return
        there = directory.exists() or directory.is_symlink()
    except OSError as error:  # a name that is too long, a folder above it that is closed
        raise CheckpointError(f"--save-dir {directory} cannot be written: {error.strerror}.") from None
    if there:
        raise CheckpointError(
            f"--save-dir {directory} exists; nothing is overwritten. Give a new folder, or remove it."
        )


def require_space(directory: Path, num_bytes: int) -> None:
    """Raises CheckpointError where the disk cannot hold that many more bytes."""
    parent = directory.resolve()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < num_bytes + SPARE_BYTES:
        raise CheckpointError(
            f"--save-dir {directory}: {in_units(num_bytes, 'B')} are to be written beside {in_units(SPARE_BYTES, 'B')} that stay free, "
            f"and the disk has {in_units(free, 'B')} left."
        )


@contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """Gives an empty folder to fill, which becomes `directory` when the block ends; an error removes it.

    Raises:
        CheckpointError: `directory` exists, or the folder cannot be written.
    """
    require_new(directory)
    unfinished = directory.with_name(f".{directory.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a run that was killed
        unfinished.mkdir(parents=True)
        yield unfinished
        fsync_dir(unfinished)
        os.rename(unfinished, directory)
        fsync_dir(directory.parent)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(f"--save-dir {directory} cannot be written: {error.strerror or error}.") from None
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
