"""The one way to open a folder with a model: a run's, a checkpoint's, or one of another program's formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_samoe.config.cli import to_mapping
from megatron_samoe.convert.edited_model import source_config
from megatron_samoe.convert.formats import HF, NATIVE, Format, formats
from megatron_samoe.convert.hf.folder import ADAPTER, WeightFile
from megatron_samoe.convert.hf.tokenizer_files import TOKENIZER, imported_tokenizer
from megatron_samoe.datasets.carried_tokenizer import read_files, with_carried
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.loading import Loaded, load_newest
from megatron_samoe.dist_checkpointing.opened import Opened, ReadTensors
from megatron_samoe.dist_checkpointing.store import LoadWords, Problems
from megatron_samoe.errors import CheckpointError, ConfigError, MegatronSamoeError, nearest, nearest_file, readable
from megatron_samoe.parallel_state.state import ParallelState

#: What a command calls its arguments that says --load-dir, and what Python says.
LOAD_DIR, PYTHON = LoadWords("--load-dir "), LoadWords("path ", "step")


def open_folder(
    path: str | Path,
    step: int | None = None,
    words: LoadWords = LOAD_DIR,
    *,
    wanted: str = "auto",
    vocab_size: int | None = None,
    problems_of: Problems = lambda directory: [],
) -> Opened:
    """Returns the model of a folder: of a run, of checkpoints, of one checkpoint, or of another program's.

    Args:
        step: iteration, where there may be several; the newest if not given.
        words: what the caller's user calls the arguments.
        wanted: name of its format, or auto.
        vocab_size: tokens that exist, where the files do not say.
        problems_of: returns what is wrong with a checkpoint's files, for which an older one is taken.

    Raises:
        CheckpointError: the folder holds nothing that is known, or is damaged, incomplete, or of a newer format.
        ConfigError: an argument means nothing for its format, or it holds a model that ours is not.
    """
    path = Path(store.checkpoints_of(str(path)))
    with _on_all_ranks():
        found = format_of(path, words)
        names = [one.name for one in formats()]
        if wanted not in ("auto", *names):
            raise ConfigError("--from", wanted, f"must be auto or one of {', '.join(names)}.{nearest(wanted, names)}")
        if wanted not in ("auto", found.name):
            raise CheckpointError(f"{words.path}{path} is {found.described}, and --from says {wanted}.")
        if vocab_size is not None and found.tells_vocabulary:
            raise ConfigError(
                "--vocab-size", vocab_size, f"is for Megatron's checkpoints; {found.described} says its own"
            )
        directory = found.find(path, step, words, problems_of)
        tensors, notes = found.read(directory, vocab_size)
    config = source_config(tensors)
    if found.name == NATIVE:
        data = with_carried(config.data, directory)
        return Opened(found.name, found.described, directory, tensors, data, tensors, notes)
    data = config.data
    if found.name == HF:
        data, _ = imported_tokenizer(data, directory, directory / TOKENIZER)
    options, files = to_mapping(replace(config, data=data)), {**read_files(data), **tensors.attachments}
    model = ReadTensors(tensors.tensors, options, tensors.train_state, files, tensors.read)
    return Opened(found.name, found.described, directory, tensors, data, model, notes)


def load_from(
    path: str | Path,
    load: Callable[[Opened], Loaded],
    parallel: ParallelState,
    step: int | None = None,
    words: LoadWords = LOAD_DIR,
) -> Loaded:
    """Returns what `load` makes of the model of a folder, by its `load_into`, or of an older checkpoint there, where files
    are damaged; all ranks call it together. See `open_folder`."""
    return load_newest(lambda problems_of: load(open_folder(path, step, words, problems_of=problems_of)), parallel)


def format_of(path: str | Path, words: LoadWords = LOAD_DIR) -> Format:
    """Returns the format of a folder.

    Raises:
        CheckpointError: it is of none that is known.
    """
    path = Path(store.checkpoints_of(str(path)))
    found = next((one for one in formats() if one.recognises(path)), None)
    if found is not None:
        return found
    known = "; ".join(one.described for one in sorted(formats(), key=lambda one: one.name != NATIVE))
    if not path.is_dir():
        what, near = ("a file", "") if path.exists() else ("not there", nearest_file(str(path)))
        raise CheckpointError(f"{words.path}{path} is {what}; it must be {known}.{near}")
    if (path / ADAPTER).exists():
        raise CheckpointError(
            f"{words.path}{path} holds an adapter of peft and no model: merge it into the model that it was trained for "
            "(merge_and_unload, then save_pretrained), and give the folder of that."
        )
    store.refuse_above_runs(path, words)
    names = sorted(readable(entry.name) for entry in path.iterdir())
    held = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}" if names else "nothing"
    raise CheckpointError(f"{words.path}{path} holds {held}; it must be {known}.")


def open_stored(
    path: str | Path, step: int | None = None, words: LoadWords = LOAD_DIR
) -> tuple[Format, Path, WeightFile]:
    """Returns a folder's format, the folder of its model, and its tensors under the names of the files.

    Raises:
        CheckpointError: the folder holds nothing that is known, or a damaged checkpoint.
    """
    path = Path(store.checkpoints_of(str(path)))
    found = format_of(path, words)
    directory = found.find(path, step, words, lambda directory: [])
    return found, directory, found.read(directory, None)[0] if found.stored is None else found.stored(directory)


@dataclass(frozen=True)
class Verdict:
    """The result of verifying one checkpoint.

    Attributes:
        checked: what was looked at.
        problems: a line each; none if all is well.
    """

    directory: Path
    checked: str
    problems: tuple[str, ...]


def verify(path: str | Path, step: int | None = None, words: LoadWords = LOAD_DIR) -> list[Verdict]:
    """Returns a verdict on each checkpoint of a folder, or on the one of `step`.

    Raises:
        CheckpointError: the folder holds no checkpoint at all.
    """
    path = Path(store.checkpoints_of(str(path)))
    found = format_of(path, words)
    if found.iterations is None:
        directories = [found.find(path, step, words, lambda directory: [])]
    else:
        directories = found.iterations(path)
        if step is not None:
            directories = [one for one in directories if one.name == store.iteration_dir(path, step).name]
            if not directories:
                raise CheckpointError(f"{words.step} {step}: {path} has no such iteration.")
    verdicts = [(directory, *found.verify(directory)) for directory in directories]
    return [Verdict(directory, checked, tuple(problems)) for directory, checked, problems in verdicts]


@contextmanager
def _on_all_ranks() -> Iterator[None]:
    """Marks errors as those of all ranks, since all open the same folder."""
    try:
        yield
    except MegatronSamoeError as error:
        error.collective = True
        raise
