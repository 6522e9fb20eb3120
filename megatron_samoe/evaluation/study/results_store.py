"""Finished runs, kept by what decides their result: no experiment of a project is trained twice.

A folder of the store is named by its key and holds run.json (configuration, sizes), metrics.jsonl and machine.json: a few
hundred kilobytes, which reports read like the folder of a run.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import zlib
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

from megatron_samoe.config.checkpoint import CheckpointConfig
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.errors import CheckpointError, MegatronSamoeError
from megatron_samoe.evaluation.run_summary import RUN_FILE, RunSummary, read_run, read_run_file
from megatron_samoe.evaluation.study.definition import Edit
from megatron_samoe.log import say_once
from megatron_samoe.parsing import JsonObject, write_atomically

#: Part of every key; to be raised when the program trains otherwise under the same options.
KEY_VERSION = 1
#: Groups of options that decide what a run computes, except the fields that do not.
DECISIVE_GROUPS = ("model", "moe", "training", "optimizer", "distillation", "data")
INDECISIVE_FIELDS = (
    "num_threads",
    "exit_interval",
    "exit_duration_in_mins",
    "skip_train",
    "optimizer_backend",
    "num_workers",
    "data_cache_path",
    "no_mmap_bin_files",
    "tokenizer_model",
    "vocab_file",
    "merge_file",
)
#: About this number of a run's records keeps a number for every expert (load, gradient, coefficients); the lists are most of its bytes.
LISTED_ROWS = 48
_DATA_PATHS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")


def decisive_options(config: PretrainConfig) -> dict[str, dict[str, Any]]:
    """Returns the options that decide what a run computes and that differ from their defaults, by group. Data are named by
    their content, not by their paths."""
    default, found = PretrainConfig(), {}
    for group in DECISIVE_GROUPS:
        options, usual = getattr(config, group), getattr(default, group)
        names = [f.name for f in fields(options) if f.name not in INDECISIVE_FIELDS]
        values = {name: getattr(options, name) for name in names if getattr(options, name) != getattr(usual, name)}
        found[group] = {k: [_content(word) for word in v] if k in _DATA_PATHS else v for k, v in values.items()}
    return {group: values for group, values in found.items() if values}


def run_key(config: PretrainConfig, edit: str | None = None) -> str:
    """Returns the key of a run's result: 16 hexadecimal digits.

    Args:
        edit: what was done to the trained model before it was evaluated.
    """
    content = [KEY_VERSION, decisive_options(config), *([edit] if edit else [])]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _content(word: str) -> str:
    """Returns what a word of a data path is: the checksum of a dataset's index, whose sizes and order it has, and its number of
    bytes; or the word, a weight."""
    index, data = Path(f"{word}.idx"), Path(f"{word}.bin")
    if not index.is_file() or not data.is_file():
        return word
    return f"{zlib.crc32(index.read_bytes()):08x}-{data.stat().st_size}"


def write_run_file(run_dir: Path, key: str, config: PretrainConfig) -> None:
    """Marks a run's folder as finished: writes run.json, completely or not at all."""
    run = read_run(run_dir)
    content = {
        "key": key,
        "config": asdict(_without_places(config)),
        "vocab_size": run.vocab_size,
        "checkpoint_bytes": run.checkpoint_bytes,
    }
    write_atomically(run_dir / RUN_FILE, json.dumps(content, indent=1) + "\n")


def _without_places(config: PretrainConfig) -> PretrainConfig:
    """Returns a configuration without the paths of one machine; data are named by their content."""
    data = config.data
    named: dict[str, Any] = {name: tuple(_content(word) for word in getattr(data, name)) for name in _DATA_PATHS}
    for name in ("tokenizer_model", "vocab_file", "merge_file"):
        path = getattr(data, name)
        named[name] = None if path is None else Path(path).name
    return replace(
        config,
        data=replace(data, data_cache_path=None, **named),
        checkpoint=CheckpointConfig(),
        logging=replace(config.logging, run_dir=None, tensorboard_dir=None, metrics_file=None),
        distillation=replace(
            config.distillation, teacher=config.distillation.teacher and Path(config.distillation.teacher).name
        ),
    )


def key_of(run_dir: Path) -> str | None:
    """Returns the key of a finished run's folder; None where none is finished.

    Raises:
        CheckpointError: the file is damaged.
    """
    kept = read_run_file(run_dir)
    return None if kept is None else str(kept["key"])


def put(store: Path, run_dir: Path) -> None:
    """Keeps a finished run in a store."""
    key = key_of(run_dir)
    assert key is not None
    _copy(run_dir, store / key)


def take(store: Path | None, key: str, run_dir: Path) -> bool:
    """Makes a run's folder one that is finished, if the store has a complete copy, and returns whether it has."""
    if store is None or not (store / key).is_dir():
        return False
    try:
        read_kept(store / key)
    except CheckpointError as error:
        say_once(f"{error} The run is made without it.")
        return False
    _copy(store / key, run_dir)
    return True


def read_kept(folder: Path) -> RunSummary:
    """Returns a run of a store.

    Raises:
        CheckpointError: it is missing, damaged, or another run than its folder's name says.
    """
    if key_of(folder) is None:
        raise CheckpointError(f"{folder} has no {RUN_FILE}, so it is not a finished run.")
    run = read_run(folder)
    if folder.name not in (run_key(run.config, edit) for edit in (None, *get_args(Edit))):
        raise CheckpointError(f"{folder} holds another run than its name says: its options make {run_key(run.config)}.")
    return run


def read_store(store: Path) -> tuple[dict[str, RunSummary], list[str]]:
    """Returns the runs of a store by key, and what is wrong with the others."""
    runs, problems = {}, []
    for folder in sorted(path for path in store.iterdir() if path.is_dir()):
        try:
            runs[folder.name] = read_kept(folder)
        except MegatronSamoeError as error:
            problems.append(str(error))
    return runs, problems


def _copy(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    if (source / "metrics.jsonl").is_file():
        rows = [json.loads(row) for row in (source / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        write_atomically(
            target / "metrics.jsonl",
            "".join(json.dumps(_short(row), separators=(",", ":")) + "\n" for row in _thinned(rows)),
        )
    if (source / "machine.json").is_file():
        shutil.copyfile(source / "machine.json", target / "machine.json")
    write_atomically(
        target / RUN_FILE, (source / RUN_FILE).read_text(encoding="utf-8")
    )  # last: it says that the others are complete


def _thinned(rows: list[JsonObject]) -> list[JsonObject]:
    """Returns records of which some LISTED_ROWS, evenly spread and the last among them, keep their lists; a second time it
    changes nothing."""
    step = math.ceil(len(rows) / LISTED_ROWS)
    return [
        row
        if number % step == step - 1 or number == len(rows) - 1
        else {name: value for name, value in row.items() if not isinstance(value, list)}
        for number, row in enumerate(rows)
    ]


def _short(value: Any, in_list: bool = False) -> Any:
    """Returns a record whose lists, with a number for every expert, have three digits of each."""
    if isinstance(value, dict):
        return {name: _short(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_short(v, in_list=True) for v in value]
    return float(f"{value:.3g}") if in_list and isinstance(value, float) else value
