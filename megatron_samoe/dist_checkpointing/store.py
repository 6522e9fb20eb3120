"""A folder of checkpoints: which are there, which is newest, and how one appears whole or not at all.

    DIR/latest_checkpointed_iteration.txt       the newest iteration, as Megatron writes it
    DIR/iter_0000100/                           one checkpoint: .metadata and *.distcp (torch.distributed.checkpoint),
                                                config.yaml, train_state.json

A checkpoint is written under another name, flushed to disk, and renamed when it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch.distributed.checkpoint.api import CheckpointException

from megatron_samoe.config.checkpoint import CheckpointConfig
from megatron_samoe.dist_checkpointing.sharded_state import ShardedState, causes_of, read_sharded, write_sharded
from megatron_samoe.errors import CheckpointError
from megatron_samoe.log import logger
from megatron_samoe.parallel_state.state import ParallelState

LATEST = "latest_checkpointed_iteration.txt"
CONFIG, TRAIN_STATE = "config.yaml", "train_state.json"
FORMAT_VERSION = 1


def iteration_dir(root: str | Path, iteration: int) -> Path:
    """Returns the folder of one checkpoint."""
    return Path(root) / f"iter_{iteration:07d}"


def repair(root: str | Path) -> None:
    """Puts back a checkpoint that was about to be replaced by a newer save of its iteration when the run was killed."""
    for replaced in Path(root).glob(".iter_*.replaced") if os.path.isdir(root) else ():
        final = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".replaced"))
        if not final.exists() and (replaced / TRAIN_STATE).is_file():
            replaced.rename(final)


def whole_iterations(root: str | Path) -> list[int]:
    """Returns the iterations of complete checkpoints in rising order."""
    names = os.listdir(root) if os.path.isdir(root) else []
    found = [int(m[1]) for name in names if (m := re.fullmatch(r"iter_(\d{7,})", name))]
    return sorted(i for i in found if (iteration_dir(root, i) / TRAIN_STATE).is_file())


def find_checkpoint(config: CheckpointConfig) -> Path | None:
    """Returns the folder that --load and --ckpt-step name; None where --load has no checkpoint.

    Raises:
        CheckpointError: the asked iteration is not there, or none is and --exit-on-missing-checkpoint is given.
    """
    if config.load is None:
        return None
    with contextlib.suppress(OSError):  # of several ranks one is first; a read-only folder stays as it is
        repair(config.load)
    iterations = whole_iterations(config.load)
    if config.ckpt_step is not None:
        if config.ckpt_step not in iterations:
            raise CheckpointError(
                f"--ckpt-step {config.ckpt_step}: {config.load} has iterations {iterations or 'none'}."
            )
        return iteration_dir(config.load, config.ckpt_step)
    if not iterations:
        _refuse_foreign(Path(config.load))
        if config.exit_on_missing_checkpoint:
            raise CheckpointError(f"--load {config.load} has no checkpoint.")
        return None
    latest = _read_latest(Path(config.load))
    if latest is not None and latest not in iterations:
        logger.warning(
            f"{config.load}/{LATEST} names iteration {latest}, which is not there; loading {iterations[-1]}."
        )
    return iteration_dir(config.load, latest if latest in iterations else iterations[-1])


def _read_latest(root: Path) -> int | None:
    try:
        return int((root / LATEST).read_text())
    except (OSError, ValueError):
        return None


def _refuse_foreign(root: Path) -> None:
    """Raises CheckpointError where a fresh start would leave what --load holds unused."""
    if root.is_file():
        raise CheckpointError(f"--load {root} is a file; it must be a folder of checkpoints.")
    if not root.is_dir():
        return
    hint = ""
    if (root / TRAIN_STATE).is_file():
        hint = f" It is itself a checkpoint: give its parent, {root.parent}."
    elif whole_iterations(root / "checkpoints"):
        hint = f" Give {root / 'checkpoints'}."
    entries = sorted(
        p.name
        for p in root.iterdir()
        if not re.fullmatch(r"\.iter_\d+\.(unfinished|replaced|deleted)|\..*\.tmp", p.name)
    )
    if entries:
        raise CheckpointError(
            f"--load {root} holds no checkpoint of this program, but {_listed(entries)}; a fresh start would leave that "
            f"unused.{hint or ' Give another folder, or convert the checkpoint.'}"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more entries" if len(names) > 3 else "")


def probe_save_dir(root: str) -> None:
    """Raises CheckpointError if checkpoints cannot be written to a folder, which is made if it is not there."""
    probe = Path(root) / f".probe_{os.getpid()}.tmp"
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        probe.write_text("probe")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"--save {root} cannot be written to: {error.strerror or error}.") from None


def read_config(directory: Path) -> Mapping[str, Any]:
    """Returns the configuration saved with a checkpoint."""
    return _read_mapping(directory / CONFIG, yaml.safe_load)


def read_train_state(directory: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the plain values saved with a checkpoint; CheckpointError where a needed key is not among them."""
    content = _read_mapping(directory / TRAIN_STATE, json.loads)
    version = content.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(f"{directory} has format version {version}; this program reads up to {FORMAT_VERSION}.")
    missing = [key for key in ("format_version", *needed) if key not in content]
    if missing:
        raise CheckpointError(f"{directory / TRAIN_STATE} is damaged: it has no {', '.join(missing)}.")
    return content


def _read_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = parse(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds {type(content).__name__} in place of a mapping.")
    return content


def save_checkpoint(
    config: CheckpointConfig, iteration: int, state: ShardedState, full_config: Mapping[str, Any],
    train_state: Mapping[str, Any], parallel: ParallelState,
) -> Path:  # fmt: skip
    """Saves one checkpoint, deletes those that retention no longer keeps, and returns its folder.

    All ranks call it together.

    Raises:
        CheckpointError: it could not be written; earlier checkpoints are as they were.
    """
    assert config.save is not None
    root, final = Path(config.save), iteration_dir(config.save, iteration)
    unfinished = root / f".{final.name}.unfinished"
    _all_ranks(lambda: _begin(root, unfinished), parallel, only_first=True, what=f"create {unfinished}")
    try:
        _all_ranks(lambda: write_sharded(state, str(unfinished), parallel), parallel, what=f"write {unfinished}")
    except CheckpointError:
        if parallel.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)  # it may be what fills the disk
        raise

    digests = _digests_of_all(unfinished, parallel)

    def publish() -> None:
        _write_durably(unfinished / CONFIG, yaml.safe_dump(dict(full_config), sort_keys=False))
        _write_durably(
            unfinished / TRAIN_STATE,
            json.dumps({"format_version": FORMAT_VERSION, **train_state, "digests": digests}, indent=1),
        )
        _fsync_dir(unfinished)
        if final.exists():
            replaced = root / f".{final.name}.replaced"
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        unfinished.rename(final)
        _fsync_dir(root)
        _write_durably(root / f".{LATEST}.tmp", str(iteration))
        (root / f".{LATEST}.tmp").rename(root / LATEST)
        _fsync_dir(root)
        _apply_retention(config, iteration)

    _all_ranks(publish, parallel, only_first=True, what=f"complete {final}")
    return final


def load_checkpoint(directory: Path, state: ShardedState, parallel: ParallelState) -> None:
    """Fills a state's tensors from a checkpoint folder, whose files are verified first; all ranks call it together.

    Raises:
        CheckpointError: a file is missing or differs from what was written, or a tensor is missing or of another shape.
    """
    _verify_digests(directory, parallel)
    read_sharded(state, str(directory), parallel)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _share_of_files(names: Sequence[str], parallel: ParallelState) -> list[str]:
    return sorted(names)[parallel.rank :: parallel.world_size]


def _digests_of_all(directory: Path, parallel: ParallelState) -> dict[str, str]:
    """Returns the digest of each file, each computed by one rank."""
    names = [path.name for path in directory.iterdir()]
    own = {name: _digest(directory / name) for name in _share_of_files(names, parallel)}
    return {name: digest for part in parallel.world.all_gather_object(own) for name, digest in part.items()}


def _verify_digests(directory: Path, parallel: ParallelState) -> None:
    """Raises CheckpointError on all ranks if a file is not what was written; each file is read by one rank."""
    digests = read_train_state(directory).get("digests", {})
    bad = []
    for name in _share_of_files(list(digests), parallel):
        path = directory / name
        if not path.is_file():
            bad.append(f"{name} is missing")
        elif _digest(path) != digests[name]:
            bad.append(f"{name} differs from what was written")
    found = [problem for part in parallel.world.all_gather_object(bad) for problem in part]
    if found:
        raise CheckpointError(
            f"{directory} is damaged: {'; '.join(found[:3])}. Choose an earlier checkpoint with --ckpt-step.",
            collective=True,
        )


def _all_ranks(action: Any, parallel: ParallelState, what: str, only_first: bool = False) -> None:
    """Runs an action and raises the same CheckpointError on all ranks if it failed on any."""
    problem = None
    if parallel.rank == 0 or not only_first:
        try:
            action()
        except (Exception, CheckpointException) as error:
            reasons = "; ".join(sorted({str(cause).splitlines()[0] for cause in causes_of(error) if str(cause)}))
            problem = f"cannot {what}{_free_space(what)}: {reasons}."
    problems = [p for p in parallel.world.all_gather_object(problem) if p]
    if problems:
        raise CheckpointError(f"{problems[0]} Earlier checkpoints are as they were.", collective=True)


def _free_space(what: str) -> str:
    """Returns a remark if the disk is nearly full, which torch's own message does not tell."""
    folder = Path(what.split(" ", 1)[1]).parent
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free
        if free < 1 << 28:
            return f" (the disk has {free / 1e6:.0f} MB left)"
    return ""


def _begin(root: Path, unfinished: Path) -> None:
    """Clears what earlier saves that were cut off have left, and makes the folder to write to."""
    repair(root)
    for leftover in root.glob(".iter_*.unfinished"):
        shutil.rmtree(leftover)
    unfinished.mkdir(parents=True)


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _fsync_dir(path: Path) -> None:
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
