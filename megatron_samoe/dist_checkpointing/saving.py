"""Saving of checkpoints that appear whole or not at all, while training waits or in the background.

A checkpoint is written into `.iter_NNNNNNN.unfinished` and flushed to disk. train_state.json, with the digest of every
file, is written last. Then the folder is renamed and `latest_checkpointed_iteration.txt` follows. A crash at any moment
leaves the earlier checkpoints. Old checkpoints are deleted after that.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from megatron_samoe.config.checkpoint import CheckpointConfig
from megatron_samoe.dist_checkpointing.digests import digest_of
from megatron_samoe.dist_checkpointing.sharded_state import ShardedState, WritableState
from megatron_samoe.dist_checkpointing.store import (
    CONFIG,
    FORMAT_VERSION,
    LATEST,
    TRAIN_STATE,
    digest_of_values,
    iteration_dir,
    repair,
    whole_iterations,
)
from megatron_samoe.errors import CheckpointError, in_units
from megatron_samoe.log import logger
from megatron_samoe.parallel_state.state import ParallelState, WaitClock


class NoRoomError(CheckpointError):
    """The disk has too little room for a checkpoint."""


#: What torch adds to each tensor in a file, and to the table of contents, at most.
OVERHEAD_BYTES_PER_PART = 4096


def save_checkpoint(
    config: CheckpointConfig,
    iteration: int,
    state: WritableState,
    full_config: Mapping[str, Any],
    train_state: Mapping[str, Any],
    parallel: ParallelState,
    attachments: Mapping[str, bytes] | None = None,
) -> Path:
    """Saves one checkpoint, deletes old ones as retention says, and returns its folder.

    All ranks call it together.

    Args:
        attachments: contents of other files, by their path in its folder.

    Raises:
        CheckpointError: the disk has too little room, or writing failed; earlier checkpoints are unchanged.
    """
    assert config.save is not None
    root, final = Path(config.save), iteration_dir(config.save, iteration)
    unfinished = root / f".{final.name}.unfinished"
    needed_bytes = sum(parallel.world.all_gather_object(bytes_to_write(state)))
    _all_ranks(lambda: _begin(unfinished, needed_bytes), parallel, f"create {unfinished}", root, only_first=True)
    try:
        written = _all_ranks(
            lambda: write_sharded(state, str(unfinished), parallel), parallel, f"write {unfinished}", root
        )
    except CheckpointError:
        if parallel.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)  # it may be what fills the disk
        raise
    digests = {name: digest for part in written for name, digest in part.items()}

    def publish() -> None:
        _write_durably(unfinished / CONFIG, yaml.safe_dump(dict(full_config), sort_keys=False))
        digests[CONFIG] = digest_of(unfinished / CONFIG)
        for name, attached in (attachments or {}).items():
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            _write_durably(unfinished / name, attached)
            fsync_dir((unfinished / name).parent)
            digests[name] = digest_of(unfinished / name)
        content = {"format_version": FORMAT_VERSION, **train_state, "digests": digests}
        content["digest"] = digest_of_values(json.loads(json.dumps(content)))
        _write_durably(unfinished / TRAIN_STATE, json.dumps(content, indent=1))
        fsync_dir(unfinished)
        if final.exists():
            replaced = root / f".{final.name}.replaced"
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        unfinished.rename(final)
        fsync_dir(root)
        _write_durably(root / f".{LATEST}.tmp", str(iteration))
        (root / f".{LATEST}.tmp").rename(root / LATEST)
        fsync_dir(root)
        _apply_retention(config, iteration)

    _all_ranks(publish, parallel, f"complete {final}", root, only_first=True)
    return final


def look_for_room(save: str, num_bytes: int, parallel: ParallelState, what: str) -> int:
    """Returns the free bytes of a folder of checkpoints; all ranks call it together.

    Args:
        what: what would be lost by continuing without room.

    Raises:
        CheckpointError: they are fewer than the `num_bytes` of a checkpoint.
    """
    root = Path(save)
    return int(_all_ranks(lambda: _free_bytes(root, num_bytes), parallel, what, root, only_first=True)[0])


class BackgroundSaver:
    """Saves while training runs. Training waits for a copy in CPU memory, and for the previous save if it still runs.

    The copy is this rank's share of the checkpoint; its memory is kept from save to save. All ranks make this object
    together, since saving needs its own process group, whose collectives do not mix with training's.
    """

    def __init__(self, parallel: ParallelState, timeout: timedelta):
        world = parallel.world
        if world.size > 1:
            world = replace(world, handle=dist.new_group(backend="gloo", timeout=timeout), waits=WaitClock())
        self.parallel = replace(parallel, world=world, device=torch.device("cpu"))
        self._copies: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(
        self,
        config: CheckpointConfig,
        iteration: int,
        state: ShardedState,
        full_config: Mapping[str, Any],
        train_state: Mapping[str, Any],
        done: Callable[[Path], None] = lambda _: None,
        attachments: Mapping[str, bytes] | None = None,
    ) -> None:
        """Copies the state and begins to save it; all ranks call it together.

        Args:
            done: called from another thread with the complete folder.
            attachments: as in `save_checkpoint`.

        Raises:
            CheckpointError: the previous save failed.
        """
        self.wait()
        copied = {name: [self._copied(name, t) for t in parts if t.is_owner] for name, parts in state.items()}

        def run() -> None:
            try:
                done(save_checkpoint(config, iteration, copied, full_config, train_state, self.parallel, attachments))
            except BaseException as error:
                self._error = error
                if self.parallel.rank == 0:
                    logger.warning(f"in the background, at the save of iteration {iteration}: {error}")

        self._thread = threading.Thread(target=run, name=f"save-{iteration}", daemon=True)
        self._thread.start()

    def _copied(self, name: str, part: Any) -> Any:
        key = (name, part.offsets)
        if key not in self._copies:
            self._copies[key] = torch.empty(part.local.shape, dtype=part.local.dtype)
        return replace(part, local=self._copies[key].copy_(part.local))

    @property
    def has_failed(self) -> bool:
        """Whether the next `wait` raises."""
        return self._error is not None

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits for the running save, if any, at most `timeout_s` seconds.

        Raises:
            CheckpointError: the save failed; the same error on all ranks.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)
            if not self._thread.is_alive():
                self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def write_sharded(
    state: WritableState, directory: str, parallel: ParallelState, objects: Mapping[str, bytes] | None = None
) -> dict[str, str]:
    """Writes a state into an existing folder and returns the digests of this rank's files; all ranks call it together.

    Args:
        objects: serialized values that this rank writes too, by name.
    """
    from megatron_samoe.dist_checkpointing.file_storage import write_parts  # slow to import, see there

    return write_parts(state, directory, parallel, objects or {})


def bytes_to_write(state: WritableState) -> int:
    """Returns an upper bound of the bytes that this rank writes."""
    return sum(
        t.dtype.itemsize * math.prod(t.sizes) + OVERHEAD_BYTES_PER_PART
        for parts in state.values()
        for t in parts
        if t.is_owner
    )


def _all_ranks(
    action: Callable[[], Any], parallel: ParallelState, what: str, root: Path, only_first: bool = False
) -> list[Any]:
    """Runs an action, raises the same CheckpointError on all ranks if it failed on any, and returns all ranks' results."""
    problem = result = None
    if parallel.rank == 0 or not only_first:
        try:
            result = action()
        except Exception as error:
            reasons = "".join(str(error).splitlines()[:1])
            room = "" if isinstance(error, NoRoomError) else _free_space(root)
            problem = f"cannot {what}{room}: {reasons.rstrip('.')}."
    ends = parallel.world.all_gather_object((problem, result))
    problems = [p for p, _ in ends if p]
    if problems:
        raise CheckpointError(f"{problems[0]} Earlier checkpoints are as they were.", collective=True)
    return [r for _, r in ends]


def _free_space(root: Path) -> str:
    """Returns a remark if the disk is nearly full or file sizes are limited, which torch's own message does not say."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and limit < 1 << 32:
        return f" (no file of this process may have more than {in_units(limit, 'B')}: ulimit -f)"
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(root).free
        if free < 1 << 28:
            return f" (the disk has {in_units(free, 'B')} left)"
    return ""


def _begin(unfinished: Path, needed_bytes: int) -> None:
    """Makes the folder to write to, where there is room for what is to be written."""
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    _free_bytes(unfinished.parent, needed_bytes)
    unfinished.mkdir()


def _free_bytes(root: Path, needed_bytes: int) -> int:
    """Removes leftovers of interrupted saves, and returns the free bytes, which are enough for a checkpoint."""
    repair(root)
    for leftover in root.glob(".iter_*.unfinished"):
        shutil.rmtree(leftover)
    for leftover in root.glob(".probe_*.tmp"):  # of a run that was killed while it looked whether it could write
        leftover.unlink(missing_ok=True)
    free = shutil.disk_usage(root).free
    if needed_bytes > free:
        raise NoRoomError(
            f"a checkpoint takes {in_units(needed_bytes, 'B')}, and {root} has {in_units(free, 'B')} left; make room, keep fewer "
            "(--keep-last), or leave optimizer state out (--no-save-optim)"
        )
    return free


def _write_durably(path: Path, content: str | bytes) -> None:
    with open(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def fsync_dir(path: Path) -> None:
    """Makes the names in a folder survive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _apply_retention(config: CheckpointConfig, newest: int) -> None:
    assert config.save is not None
    root = Path(config.save)
    for suffix in ("replaced", "deleted"):
        for leftover in root.glob(f".iter_*.{suffix}"):
            shutil.rmtree(leftover, ignore_errors=True)
    if config.keep_last is None and config.save_retain_interval is None:
        return
    older = [i for i in whole_iterations(root) if i < newest]
    kept = set(older[max(0, len(older) - (config.keep_last or 1) + 1) :])
    if config.save_retain_interval is not None:
        kept |= {i for i in older if i % config.save_retain_interval == 0}
    for iteration in older:
        if iteration not in kept:
            doomed = root / f".iter_{iteration:07d}.deleted"
            iteration_dir(root, iteration).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
