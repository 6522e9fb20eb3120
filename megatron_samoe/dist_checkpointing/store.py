"""A folder of checkpoints: the search for one to load, its verification, and what it holds.

    DIR/latest_checkpointed_iteration.txt       the newest iteration, as Megatron writes it
    DIR/iter_0000100/                           one checkpoint: .metadata and *.distcp (torch.distributed.checkpoint),
                                                config.yaml, train_state.json

saving.py says when a checkpoint is whole: a folder without `.unfinished` has train_state.json, whose digests
`damaged_files` compares with every file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_samoe.config.checkpoint import CheckpointConfig
from megatron_samoe.config.saved import upgrade
from megatron_samoe.dist_checkpointing.digests import digest_of, is_damage, new_digest
from megatron_samoe.dist_checkpointing.table_of_contents import MAX_METADATA_BYTES
from megatron_samoe.errors import CheckpointError, shown, some
from megatron_samoe.log import say_once
from megatron_samoe.parallel_state.state import ParallelState
from megatron_samoe.parsing import finite_float, parse_json, parse_yaml, read_file, read_text

#: Returns what is wrong with the files of a checkpoint.
Problems = Callable[[Path], list[str]]

LATEST = "latest_checkpointed_iteration.txt"
CONFIG, TRAIN_STATE = "config.yaml", "train_state.json"
#: 2: files are digested by BLAKE3. Version 1 is read as well.
FORMAT_VERSION = 2


@dataclass(frozen=True)
class LoadWords:
    """A user's words for what is loaded: in front of a folder, and for the iteration."""

    path: str = "--load "
    step: str = "--ckpt-step"


def iteration_dir(root: str | Path, iteration: int) -> Path:
    """Returns the folder of one checkpoint."""
    return Path(root) / f"iter_{iteration:07d}"


def repair(root: str | Path) -> None:
    """Restores a checkpoint that a newer save of its iteration was replacing when the run was killed."""
    for replaced in Path(root).glob(".iter_*.replaced") if os.path.isdir(root) else ():
        final = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".replaced"))
        if not final.exists() and (replaced / TRAIN_STATE).is_file():
            replaced.rename(final)


def _repair_if_possible(root: str | Path) -> None:
    with contextlib.suppress(OSError):  # of several ranks one is first; a read-only folder stays as it is
        repair(root)


def whole_iterations(root: str | Path) -> list[int]:
    """Returns the iterations of complete checkpoints in rising order."""
    names = os.listdir(root) if os.path.isdir(root) else []
    found = [int(m[1]) for name in names if (m := re.fullmatch(r"iter_(\d{7,})", name))]
    return sorted(i for i in found if (iteration_dir(root, i) / TRAIN_STATE).is_file())


def newest_in_words(root: str | Path | None) -> str:
    """Returns a sentence on the checkpoint that a run can resume from, as its folder is now."""
    if root is None:
        return "Nothing was saved, since there is neither --save nor --run-dir."
    try:
        os.listdir(root)
    except FileNotFoundError:
        pass
    except OSError as error:
        return f"Whether {root} has a complete checkpoint cannot be seen: {error.strerror}."
    done = whole_iterations(root)
    return (
        f"The newest complete checkpoint is {iteration_dir(root, done[-1])}."
        if done
        else f"{root} has no complete checkpoint."
    )


def checkpoints_of(load: str) -> str:
    """Returns `load`, or `load`/checkpoints where that is a run's folder."""
    below = Path(load) / "checkpoints"
    return str(below) if not whole_iterations(load) and whole_iterations(below) else load


def with_start(config: CheckpointConfig) -> CheckpointConfig:
    """Returns the configuration with --pretrained-checkpoint applied: --load and --finetune of it, while --load has no
    checkpoint.

    Raises:
        CheckpointError: --load holds something else, or --pretrained-checkpoint is needed and has no checkpoint.
    """
    pretrained, load = config.pretrained_checkpoint, config.load
    if pretrained is None:
        return config
    if load is not None:
        _repair_if_possible(load)
        if _has_checkpoint(load):
            return config
        _refuse_foreign(Path(load))
    refuse_without_checkpoint(pretrained, "--pretrained-checkpoint")
    return replace(config, load=pretrained, finetune=True, ckpt_step=None)  # the step is one of --load's


def _has_checkpoint(folder: str) -> bool:
    return bool(whole_iterations(checkpoints_of(folder))) or (Path(folder) / TRAIN_STATE).is_file()


def refuse_without_checkpoint(folder: str, flag: str) -> None:
    """Raises CheckpointError where a folder that a flag names has no checkpoint, saying what it has."""
    if not _has_checkpoint(folder):
        _refuse_foreign(Path(folder), LoadWords(f"{flag} "))
        raise CheckpointError(f"{flag} {folder} has no checkpoint.", collective=True)


def find_checkpoint(
    config: CheckpointConfig, problems_of: Problems = lambda _: [], words: LoadWords = LoadWords()
) -> Path | None:
    """Returns the folder that --load and --ckpt-step name; None where --load has no checkpoint.

    A damaged checkpoint is skipped for the next older one, with a warning, unless --ckpt-step asks for it.

    Args:
        problems_of: returns what is wrong with the files of a checkpoint (`loading.load_newest` gives one); if not given,
            only its description is checked.
        words: what the user calls --load and --ckpt-step.

    Raises:
        CheckpointError: the asked iteration is missing or damaged, all checkpoints are damaged, or none is there with
            --exit-on-missing-checkpoint.
    """
    if config.load is None:
        return None
    if (Path(config.load) / TRAIN_STATE).is_file() and config.ckpt_step is None:
        if said := _damage(Path(config.load), problems_of):
            raise CheckpointError(said, collective=True)
        return Path(config.load)
    config = replace(config, load=checkpoints_of(config.load))
    assert config.load is not None
    _repair_if_possible(config.load)
    iterations = whole_iterations(config.load)
    if config.ckpt_step is not None and config.ckpt_step not in iterations:
        raise CheckpointError(f"{words.step} {config.ckpt_step}: {config.load} has iterations {iterations or 'none'}.")
    if not iterations:
        _refuse_foreign(Path(config.load), words)
        if config.exit_on_missing_checkpoint:
            raise CheckpointError(f"{words.path}{config.load} has no checkpoint.")
        return None
    damaged: list[str] = []
    for iteration in _in_order_of_choice(config, iterations):
        directory = iteration_dir(config.load, iteration)
        said = _damage(directory, problems_of)
        if not said:
            for line in damaged:
                say_once(f"{line} It is passed over; loading iteration {iteration}.")
            return directory
        damaged.append(said)
    hint = f"Choose another with {words.step}." if len(damaged) < len(iterations) else "Bring one back from a copy."
    raise CheckpointError(" ".join([*damaged[:3], hint]), collective=True)


def _in_order_of_choice(config: CheckpointConfig, iterations: list[int]) -> list[int]:
    """Returns the iterations to try: only the asked one; else the latest, as its file names it, and older ones."""
    assert config.load is not None
    if config.ckpt_step is not None:
        return [config.ckpt_step]
    latest = _read_latest(Path(config.load))
    if latest is not None and latest not in iterations:
        say_once(f"{config.load}/{LATEST} names iteration {latest}, which is not there; loading {iterations[-1]}.")
    newest = latest if latest in iterations else iterations[-1]
    return [i for i in reversed(iterations) if i <= newest]


def _damage(directory: Path, problems_of: Problems) -> str:
    """Returns a sentence on what is wrong with a checkpoint, empty where nothing is."""
    try:
        read_config(directory)
    except _NewerFormat:
        raise
    except CheckpointError as error:
        problems = [str(error)]
    else:
        problems = problems_of(directory)
    return f"{directory} is damaged: {'; '.join(problems[:3]).rstrip('.')}." if problems else ""


def _read_latest(root: Path) -> int | None:
    try:
        return int(read_file(root / LATEST))
    except (OSError, ValueError):
        return None


def _refuse_foreign(root: Path, words: LoadWords = LoadWords()) -> None:
    """Raises CheckpointError where a folder to load from holds other things than checkpoints; an empty one passes."""
    if root.is_file():
        raise CheckpointError(f"{words.path}{root} is a file; it must be a folder of checkpoints.")
    if not root.is_dir():
        return
    entries = sorted(
        p.name
        for p in root.iterdir()
        if not re.fullmatch(r"\.iter_\d+\.(unfinished|replaced|deleted)|\..*\.tmp|\.lock|hangs|profile", p.name)
    )
    refuse_above_runs(root, words)
    if entries:
        raise CheckpointError(
            f"{words.path}{root} holds no checkpoint of this program, but {some(entries)}."
            " Give another folder, or convert the checkpoint."
        )


def refuse_above_runs(root: Path, words: LoadWords) -> None:
    """Raises CheckpointError naming the runs in a folder that has no checkpoint itself."""
    below = sorted(path for depth in ("*/", "*/*/") for path in root.glob(depth))
    runs = [str(p) for p in below if not re.match("checkpoints$|iter_", p.name) and _has_checkpoint(str(p))]
    if runs:
        raise CheckpointError(
            f"{words.path}{root} is a folder above runs and has no checkpoint itself: give one of {some(runs)}."
        )


def probe_save_dir(root: str) -> None:
    """Raises CheckpointError if checkpoints cannot be written to a folder, which is made if missing."""
    probe = Path(root) / f".probe_{os.getpid()}.tmp"
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        probe.write_text("probe")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"--save {root} cannot be written to: {error.strerror or error}.") from None


class _NewerFormat(CheckpointError):
    """The checkpoint is of a later version of this program. It is not damaged, so an older one does not replace it."""


def read_config(directory: Path) -> Mapping[str, Any]:
    """Returns the configuration saved with a checkpoint."""
    digest = read_train_state(directory)["digests"].get(CONFIG)
    config = _read_mapping(directory / CONFIG, parse_yaml)
    if digest is not None and digest_of(directory / CONFIG, digest) != digest:
        raise CheckpointError(f"{directory / CONFIG} differs from what was written.")
    for name, group in config.items():
        if group is not None and not isinstance(group, Mapping):
            raise CheckpointError(
                f"{directory / CONFIG} is damaged: {name} is {shown(group)}, which is not a group of options."
            )
    return upgrade(config)


def read_train_state(directory: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the plain values saved with a checkpoint; CheckpointError where a needed key is not among them."""
    content = _read_mapping(directory / TRAIN_STATE, parse_json)
    version = content.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise _NewerFormat(
            f"{directory} has format version {shown(version)}; this program reads up to {FORMAT_VERSION}."
        )
    # Every release has written both digests, so a description without them is not what was written.
    missing = [key for key in ("format_version", "digests", "digest", *needed) if key not in content]
    if missing:
        raise CheckpointError(f"{directory / TRAIN_STATE} is damaged: it has no {', '.join(missing)}.")
    digest = content.pop("digest")
    if not isinstance(digest, str) or digest != digest_of_values(content, digest):
        raise CheckpointError(f"{directory / TRAIN_STATE} differs from what was written.")
    refuse_wrong_values(content, str(directory / TRAIN_STATE))
    return content


#: Key of the parts of a model that came from outside the package.
PARTS = "parts"


def refuse_parts(train_state: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError naming the model parts of a checkpoint that only the program which trained it has, for whoever
    runs it or writes it in another form. A balance strategy is none of these: it trained the model, and computes nothing of it.
    """
    parts = train_state.get(PARTS)
    if isinstance(parts, dict):
        parts = {kind: name for kind, name in parts.items() if kind != "balance"}
    if parts:
        named = ", ".join(f"{name} {what}" for name, what in parts.items()) if isinstance(parts, dict) else shown(parts)
        raise CheckpointError(
            f"{where} is of a model with parts from outside megatron_samoe ({named}). Only the program that trained it can "
            "run it."
        )


#: Values of train_state.json that count something, with the least that each may be.
_COUNTS = {
    "format_version": 1,
    "iteration": 0,
    "consumed_samples": 0,
    "consumed_tokens": 0,
    "vocab_size": 1,
    "optimizer_steps": 0,
}


def refuse_wrong_values(content: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError naming a value in a training state that no run can have written."""
    for key, least in _COUNTS.items():
        value = content.get(key, least)
        whole = type(value) is int or (key == "optimizer_steps" and type(value) is float and value.is_integer())
        if not (whole and least <= value < (2**31 if key == "vocab_size" else 2**62)):
            raise CheckpointError(f"{where} is damaged: {key} is {shown(value)}, which is not a count.")
    scale = content.get("loss_scale", {})
    if not isinstance(scale, Mapping) or any(
        finite_float(value) is None or isinstance(value, str) for value in scale.values() if not isinstance(value, bool)
    ):
        raise CheckpointError(f"{where} is damaged: loss_scale is {shown(scale)}.")
    digests = content.get("digests", {})
    if not isinstance(digests, Mapping) or not all(isinstance(digest, str) for digest in digests.values()):
        raise CheckpointError(f"{where} is damaged: digests is {shown(digests)}.")


def digest_of_values(content: Mapping[str, Any], like: str = "") -> str:
    """Returns the digest of a description's other values, of the same kind as `like`."""
    digest = new_digest(like)
    digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()


def attachments_of(directory: Path) -> dict[str, bytes]:
    """Returns the contents of the files in a checkpoint's subfolders, by their path in it."""
    digests = read_train_state(directory)["digests"]
    names = [name for name in digests if "/" in name and (directory / name).is_file()]
    try:
        return {name: read_file(directory / name, MAX_METADATA_BYTES) for name in names}
    except OSError as error:
        raise CheckpointError(f"{directory} is damaged: {error.filename}: {error.strerror}.") from None


def _read_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = parse(read_text(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        held = "is empty" if content is None else f"holds a {type(content).__name__} in place of a mapping"
        raise CheckpointError(f"{path} is damaged: it {held}.")
    return content


def is_tensor_file(name: str) -> bool:
    """Returns whether a file of a checkpoint holds tensors."""
    return name.endswith(".distcp")


def damaged_files(directory: Path, parallel: ParallelState, with_tensors: bool = True) -> list[str]:
    """Returns a line for each file of a checkpoint that differs from what was written, the same on all ranks.

    All ranks call it together; each reads its share of the files.

    Args:
        with_tensors: compare the files of tensors too, which loading does anyway; else these must be there.
    """
    digests = read_train_state(directory)["digests"]
    bad, unread = [], []
    for name in sorted(digests)[parallel.rank :: parallel.world_size]:
        try:
            problem = _problem_of(directory / name, digests[name], with_tensors)
        except OSError as error:
            problem = f"{name} cannot be read: {error.strerror or error}"
            if not is_damage(error):
                unread.append(f"{directory / problem}.")
        if problem:
            bad.append(problem)
    ranks = parallel.world.all_gather_object((bad, unread))
    for _, sentences in ranks:
        if sentences:
            raise CheckpointError(sentences[0], collective=True)
    return [problem for part, _ in ranks for problem in part]


def _problem_of(path: Path, digest: str, with_tensors: bool) -> str:
    if not path.is_file():
        return f"{path.name} is missing"
    if is_tensor_file(path.name):
        differs = with_tensors and digest_of(path, digest) != digest
    elif path.stat().st_size > MAX_METADATA_BYTES:
        return f"{path.name} is larger than what was written"
    else:
        differs = digest_of(path, digest) != digest
    return f"{path.name} differs from what was written" if differs else ""
