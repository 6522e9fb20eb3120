"""Opens a checkpoint of any family to be looked at."""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_samoe.convert.hf.export import differences
from megatron_samoe.convert.hf.folder import HFFolder, WeightFile
from megatron_samoe.convert.hf.source import HFSource
from megatron_samoe.convert.megatron.rank_files import FILE_NAME, find_iteration, load_rank_file, rank_folders
from megatron_samoe.convert.megatron.reader import MegatronReader
from megatron_samoe.convert.source import Kind, kind_of
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.global_tensors import CheckpointReader, StoredTensor
from megatron_samoe.dist_checkpointing.saved_tensor import is_plain
from megatron_samoe.errors import CheckpointError, ConfigError, MegatronSamoeError, shown


@dataclass(frozen=True)
class Opened:
    """A checkpoint.

    Attributes:
        directory: of the one checkpoint, which may lie below the folder that was given.
        config: the model's configuration; None where the tensors have the names of their files.
    """

    kind: Kind
    directory: Path
    source: WeightFile
    config: Mapping[str, Any] | None = None
    train_state: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


class RankFiles:
    """Megatron's tensors under the names of their files: mp_rank_00/model.decoder..."""

    def __init__(self, directory: Path):
        self._folders = {folder.name: folder for folder in rank_folders(directory)}
        self.tensors: dict[str, StoredTensor] = {}
        for name, folder in self._folders.items():
            for model, content in load_rank_file(folder).items():
                if model.startswith("model") and isinstance(content, dict):
                    for key, value in content.items():
                        if isinstance(value, Tensor):
                            if not is_plain(value) or not isinstance(key, str):
                                raise CheckpointError(
                                    f"{folder}: {shown(key)} is no dense tensor with its elements in the file."
                                )
                            self.tensors[f"{name}/{model}.{key}"] = StoredTensor(tuple(value.shape), value.dtype)

    def read(self, name: str) -> Tensor:
        """Returns a tensor of one rank."""
        rank, _, rest = name.partition("/")
        model, _, key = rest.partition(".")
        return load_rank_file(self._folders[rank])[model][key].clone()


def open_any(given: str | Path, ckpt_step: int | None = None, raw: bool = False) -> Opened:
    """Returns a folder's checkpoint, its tensors under our names.

    Args:
        ckpt_step: iteration, where there may be several; the newest if not given.
        raw: keep the names of foreign files.

    Raises:
        CheckpointError: the folder holds no checkpoint that is known, or a damaged one.
        ConfigError: `ckpt_step` means nothing for a Hugging Face folder, or it holds a model that ours is not.
    """
    path = Path(store.checkpoints_of(str(given)))
    kind = _kind(path)
    if kind == "native":
        reader = CheckpointReader(_native_directory(path, ckpt_step))
        return Opened(kind, reader.directory, reader, reader.config, reader.train_state)
    if kind == "megatron":
        if raw:
            directory = find_iteration(path, ckpt_step)
            return Opened(kind, directory, RankFiles(directory))
        megatron = MegatronReader(path, ckpt_step)
        return Opened(kind, megatron.directory, megatron, megatron.config, megatron.train_state)
    if ckpt_step is not None:
        raise ConfigError("--ckpt-step", ckpt_step, "a Hugging Face folder holds one model only")
    if raw:
        return Opened(kind, path, HFFolder(path))
    try:
        folder = HFSource(path)
    except ConfigError as error:
        raise ConfigError(
            error.field, error.value, f"{error.allowed} --raw looks at the tensors as they are."
        ) from None
    return Opened(kind, path, folder, folder.config, folder.train_state, tuple(folder.notes))


def _kind(path: Path) -> Kind:
    try:
        return kind_of(path)
    except CheckpointError as error:
        raise CheckpointError(str(error).removeprefix("--load-dir ")) from None


def _native_directory(path: Path, ckpt_step: int | None) -> Path:
    if (path / store.TRAIN_STATE).is_file():
        if ckpt_step is not None:
            raise ConfigError("--ckpt-step", ckpt_step, f"{path} is one checkpoint; give its parent to choose another")
        return path
    iterations = store.whole_iterations(path)
    if ckpt_step is not None and ckpt_step not in iterations:
        raise CheckpointError(f"{path} has no iteration {ckpt_step}; it has {', '.join(map(str, iterations))}.")
    return store.iteration_dir(path, iterations[-1] if ckpt_step is None else ckpt_step)


@dataclass(frozen=True)
class Verdict:
    """What verifying one checkpoint found.

    Attributes:
        checked: what was looked at.
        problems: a line each; none if all is well.
    """

    directory: Path
    checked: str
    problems: tuple[str, ...]


def verify(given: str | Path, ckpt_step: int | None = None) -> list[Verdict]:
    """Returns a verdict on each checkpoint of a folder, or on the one of `ckpt_step`.

    Raises:
        CheckpointError: the folder holds no checkpoint at all.
    """
    path = Path(store.checkpoints_of(str(given)))
    kind = _kind(path)
    if kind == "hf":
        return [_verdict(path, "headers, sizes and names (the format has no digests)", lambda: _check_hf(path))]
    if kind == "megatron":
        directory = find_iteration(path, ckpt_step)
        return [_verdict(directory, "CRC-32 of every entry, names and shapes", lambda: _check_megatron(directory))]
    if ckpt_step is not None or (path / store.TRAIN_STATE).is_file():
        directories = [_native_directory(path, ckpt_step)]
    else:
        directories = [store.iteration_dir(path, iteration) for iteration in store.whole_iterations(path)]
    return [_verdict(d, _checked_of_native(d), partial(_check_native, d)) for d in directories]


def _verdict(directory: Path, checked: str, check: Callable[[], list[str]]) -> Verdict:
    try:
        problems = check()
    except MegatronSamoeError as error:
        problems = [str(error)]
    return Verdict(directory, checked, tuple(problems))


def _check_hf(directory: Path) -> list[str]:
    folder = HFFolder(directory)
    for name in folder.tensors:
        folder.read(name)
    with contextlib.suppress(ConfigError):  # a model that ours is not may be whole all the same
        HFSource(directory)
    return []


def _check_megatron(directory: Path) -> list[str]:
    problems = []
    for folder in rank_folders(directory):
        try:
            with zipfile.ZipFile(folder / FILE_NAME) as archive:
                bad = archive.testzip()
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            bad = str(error)
        if bad:
            problems.append(f"{folder.name}/{FILE_NAME} differs from what was written ({bad})")
    if not problems:
        MegatronReader(directory)
    return problems


def _checked_of_native(directory: Path) -> str:
    try:
        state = store.read_train_state(directory)
    except CheckpointError:  # which checking says
        return store.TRAIN_STATE
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    others = sorted(files - {store.TRAIN_STATE, *state["digests"]})
    checked = f"digests of {len(state['digests'])} files, names and shapes"
    if state.get(store.PARTS):
        checked = (
            f"digests of {len(state['digests'])} files; names and shapes cannot be checked: its model has parts from outside "
            "megatron_samoe"
        )
    return checked + (f"; not a part of it: {', '.join(map(shown, others[:3]))}" if others else "")


def _foreign_parts(directory: Path) -> bool:
    """Whether only the program that trained a checkpoint knows its model."""
    try:
        return bool(store.read_train_state(directory).get(store.PARTS))
    except CheckpointError:  # damaged, which checking says
        return False


def _check_native(directory: Path) -> list[str]:
    reader = CheckpointReader(directory)
    return [*reader.verify(), *([] if _foreign_parts(directory) else differences(reader))]
