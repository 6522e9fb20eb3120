"""The formats of folders that hold a model, each a row of a table: how it is recognised, read and verified."""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_samoe.config.checkpoint import CheckpointConfig
from megatron_samoe.config.entry_points import added
from megatron_samoe.convert.hf.export import differences
from megatron_samoe.convert.hf.folder import HFFolder, WeightFile, is_hf_folder
from megatron_samoe.convert.hf.source import HFSource
from megatron_samoe.convert.megatron.rank_files import (
    DISTRIBUTED,
    FILE_NAME,
    find_iteration,
    is_iteration,
    load_rank_file,
    rank_folders,
)
from megatron_samoe.convert.megatron.reader import MegatronReader
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.global_tensors import (
    CheckpointReader,
    DistributedTensors,
    GlobalTensors,
    StoredTensor,
)
from megatron_samoe.dist_checkpointing.saved_tensor import is_plain
from megatron_samoe.dist_checkpointing.store import LoadWords, Problems
from megatron_samoe.errors import CheckpointError, ConfigError, in_units, shown

#: Entry points by which installed packages add formats.
GROUP = "megatron_samoe.formats"


@dataclass(frozen=True)
class Format:
    """A format of folders.

    Attributes:
        name: of --from.
        described: in words.
        recognises: whether a folder is of it.
        find: returns the folder of the one model, of an iteration if several may be there.
        read: returns a model's tensors and lines about them; takes the vocabulary's size, for files that do not say it.
        stored: returns the tensors under the names of the files; None where these are ours.
        verify: returns what was looked at, and a line for each problem.
        iterations: returns all folders of models in a folder.
    """

    name: str
    described: str
    recognises: Callable[[Path], bool]
    find: Callable[[Path, int | None, LoadWords, Problems], Path]
    read: Callable[[Path, int | None], tuple[GlobalTensors, tuple[str, ...]]]
    verify: Callable[[Path], tuple[str, list[str]]]
    stored: Callable[[Path], WeightFile] | None = None
    iterations: Callable[[Path], list[Path]] | None = None
    tells_vocabulary: bool = True


def _find_native(path: Path, step: int | None, words: LoadWords, problems_of: Problems) -> Path:
    """Returns the folder of a step, or of the newest checkpoint that is not damaged."""
    if step is not None and (path / store.TRAIN_STATE).is_file():
        raise ConfigError(words.step, step, f"{path} is one checkpoint; give its parent to choose another")
    wanted = CheckpointConfig(load=str(path), ckpt_step=step, exit_on_missing_checkpoint=True)
    found = store.find_checkpoint(wanted, problems_of, words)
    assert found is not None
    return found


def _is_native(path: Path) -> bool:
    return (path / store.TRAIN_STATE).is_file() or bool(store.whole_iterations(path))


def _read_native(directory: Path, vocab_size: int | None) -> tuple[GlobalTensors, tuple[str, ...]]:
    reader = CheckpointReader(directory)
    size = sum(t.num_bytes for name, t in reader.tensors.items() if name.startswith("optimizer."))
    return reader, (f"Its optimizer state ({in_units(size, 'B')}) is left out.",) if size else ()


def _native_iterations(path: Path) -> list[Path]:
    if (path / store.TRAIN_STATE).is_file():
        return [path]
    return [store.iteration_dir(path, iteration) for iteration in store.whole_iterations(path)]


def _verify_native(directory: Path) -> tuple[str, list[str]]:
    state: Mapping[str, Any] = {}
    with contextlib.suppress(CheckpointError):  # which the reader says
        state = store.read_train_state(directory)
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    digests, parts = state.get("digests", {}), bool(state.get(store.PARTS))
    others = sorted(files - {store.TRAIN_STATE, *digests}) if state else []
    checked = f"digests of {len(digests)} files, names and shapes" if state else store.TRAIN_STATE
    if parts:  # only the program that trained the model knows it
        checked = (
            f"digests of {len(digests)} files; names and shapes cannot be checked: its model has parts from outside "
            "megatron_samoe"
        )
    checked += f"; not a part of it: {', '.join(map(shown, others[:3]))}" if others else ""
    with _as_problem() as problems:
        reader = CheckpointReader(directory)
        problems += [*reader.verify(), *([] if parts else differences(reader))]
    return checked, problems


def _find_hf(path: Path, step: int | None, words: LoadWords, _: Problems) -> Path:
    if step is not None:
        raise ConfigError(words.step, step, "a Hugging Face folder holds one model only")
    return path


def _read_hf(directory: Path, vocab_size: int | None) -> tuple[GlobalTensors, tuple[str, ...]]:
    source = HFSource(directory)
    return source, (f"Its class is {source.family.architecture}.", *source.notes)


def _verify_hf(directory: Path) -> tuple[str, list[str]]:
    with _as_problem() as problems:
        folder = HFFolder(directory)
        for name in folder.tensors:
            folder.read(name)
        with contextlib.suppress(ConfigError):  # a model that ours is not may be whole all the same
            HFSource(directory)
    return "headers, sizes and names (the format has no digests)", problems


def _find_megatron(path: Path, step: int | None, words: LoadWords, _: Problems) -> Path:
    return find_iteration(path, step)


def _has_iteration(path: Path, is_right: Callable[[Path], bool]) -> bool:
    if is_iteration(path) or not (path / store.LATEST).is_file():
        return is_right(path)
    try:
        return is_right(find_iteration(path))
    except CheckpointError:
        return False


def _read_megatron(directory: Path, vocab_size: int | None) -> tuple[GlobalTensors, tuple[str, ...]]:
    reader = MegatronReader(directory, vocab_size=vocab_size)
    return reader, tuple(reader.notes)


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
                                    f"{folder}: {shown(key)} is not a dense tensor with its elements in the file."
                                )
                            self.tensors[f"{name}/{model}.{key}"] = StoredTensor(tuple(value.shape), value.dtype)

    def read(self, name: str) -> Tensor:
        """Returns a tensor of one rank."""
        rank, _, rest = name.partition("/")
        model, _, key = rest.partition(".")
        return load_rank_file(self._folders[rank])[model][key].clone()


def _verify_rank_files(directory: Path) -> tuple[str, list[str]]:
    with _as_problem() as problems:
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
    return "CRC-32 of every entry, names and shapes", problems


def _verify_torch_dist(directory: Path) -> tuple[str, list[str]]:
    with _as_problem() as problems:
        tensors = DistributedTensors(directory)
        for name in tensors.tensors:
            tensors.read(name)
        MegatronReader(directory)
    return "CRC-32 of every tensor, names and shapes", problems


@contextlib.contextmanager
def _as_problem() -> Any:
    """Gives a list, to which an error of the block is added."""
    problems: list[str] = []
    try:
        yield problems
    except (CheckpointError, ConfigError) as error:
        problems.append(str(error))


NATIVE, HF, MEGATRON, TORCH_DIST = "native", "hf", "megatron", "torch_dist"
_OURS = (
    Format(HF, "a Hugging Face folder", is_hf_folder, _find_hf, _read_hf, _verify_hf, stored=HFFolder),
    Format(
        NATIVE,
        "a checkpoint of this program",
        _is_native,
        _find_native,
        _read_native,
        _verify_native,
        iterations=_native_iterations,
    ),
    Format(
        TORCH_DIST,
        "a checkpoint of Megatron-LM (format torch_dist)",
        lambda path: _has_iteration(path, lambda p: (p / DISTRIBUTED).is_file()),
        _find_megatron,
        _read_megatron,
        _verify_torch_dist,
        stored=DistributedTensors,
        tells_vocabulary=False,
    ),
    # Last: its reader says what is wrong with a folder that only its tracker file makes look like one.
    Format(
        MEGATRON,
        "a checkpoint of Megatron-LM (format torch)",
        lambda path: bool(rank_folders(path)) or (path / store.LATEST).is_file(),
        _find_megatron,
        _read_megatron,
        _verify_rank_files,
        stored=RankFiles,
        tells_vocabulary=False,
    ),
)


@cache
def formats() -> tuple[Format, ...]:
    """Returns our formats after those of installed packages, in the order in which a folder is compared with them.

    Raises:
        ConfigError: an installed package's entry point cannot be loaded, is not a Format, or its name is taken.
    """
    found: list[Format] = []
    for place, value, one in added(GROUP):
        if not isinstance(one, Format):
            raise ConfigError(place, value, f"must name a Format, not {type(one).__name__}")
        if one.name in (other.name for other in (*found, *_OURS)):
            raise ConfigError(place, one.name, "is the name of another format, too; rename or uninstall one")
        found.append(one)
    return (*found, *_OURS)
