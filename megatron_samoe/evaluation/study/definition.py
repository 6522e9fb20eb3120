"""A study as its YAML file describes it, and the runs that it consists of."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_samoe.config.cli import read_yaml
from megatron_samoe.errors import ConfigError, nearest

Edit = Literal["select", "fold"]


@dataclass(frozen=True)
class Variant:
    """One model of a study.

    Attributes:
        flags: of pretraining, beyond the study's configuration.
        edited_from: name of the variant whose trained checkpoints are edited; this one is not trained then.
        edit: what is done to them, an action of tools/edit_checkpoint.py.
    """

    name: str
    flags: tuple[str, ...]
    edited_from: str | None = None
    edit: Edit | None = None

    @property
    def is_trained(self) -> bool:
        """Whether it is trained itself, and not made of another by editing."""
        return self.edited_from is None


@dataclass(frozen=True)
class Study:
    """The content of a study's file.

    Attributes:
        config: YAML file of options that all runs share.
        baseline: name of the variant that the others are compared with.
        variants: trained ones first.
    """

    title: str
    config: Path
    seeds: tuple[int, ...]
    baseline: str
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class Run:
    """A variant with one seed, in a folder of its own."""

    variant: Variant
    seed: int
    directory: Path

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.directory / "checkpoints"


def plan_runs(study: Study, root: Path) -> list[Run]:
    """Returns all runs in the order in which they are made: seeds outermost, so that a study cut short is a whole one
    of fewer seeds; edited variants after the one they come from."""
    return [
        Run(variant, seed, root / folder_name(variant.name) / f"seed-{seed}")
        for seed in study.seeds
        for variant in study.variants
    ]


def folder_name(variant: str) -> str:
    """Returns a variant's name as a folder: `samoe, one bank` is in `samoe-one-bank`."""
    return re.sub(r"[^a-z0-9.]+", "-", variant.lower()).strip("-")


#: Options that are one word with an entry for each layer, which a study may write as a list.
MAPS = ("expert-sharing",)
_KEYS = ("title", "config", "seeds", "baseline", "runs", "derived")


def read_study(path: Path, seeds: list[int] | None = None) -> Study:
    """Returns the study that a YAML file describes, with other seeds if some are given.

    Raises:
        ConfigError: the file is no study; the message names the key.
    """
    content = read_yaml(path)
    for key in content:
        if key not in _KEYS:
            raise ConfigError(str(key), content[key], f"unknown key in {path}.{nearest(str(key), _KEYS)}")
    missing = [key for key in ("title", "config", "seeds", "runs") if not content.get(key)]
    if missing:
        raise ConfigError(str(path), ", ".join(missing), "missing: a study needs title, config, seeds and runs")
    seeds = seeds or content["seeds"]
    if not isinstance(seeds, list) or not all(type(s) is int for s in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigError("seeds", seeds, f"must be different whole numbers, in {path} or after --seeds")
    config = path.parent / str(content["config"])
    if not os.path.isfile(config):  # which a name that no file can have is not, either
        raise ConfigError("config", content["config"], f"no such file beside {path}")
    variants = [Variant(name, tuple(_flags(options))) for name, options in _mapping(content, "runs", path).items()]
    variants += _edited(_mapping(content, "derived", path), [v.name for v in variants], path)
    names = [v.name for v in variants]
    _check_names(names)
    baseline = content.get("baseline", names[0])
    _one_of("baseline", baseline, names)
    return Study(str(content["title"]), config, tuple(seeds), baseline, tuple(variants))


def _mapping(content: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, dict) or not all(v is None or isinstance(v, dict) for v in value.values()):
        raise ConfigError(key, value, f"must map names to mappings in {path}")
    return {str(name): options or {} for name, options in value.items()}


def _edited(derived: Mapping[str, Any], trained: Sequence[str], path: Path) -> list[Variant]:
    variants = []
    for name, options in derived.items():
        place = f"derived.{name}"
        for key in options:
            if key not in ("from", "edit"):
                raise ConfigError(f"{place}.{key}", options[key], f"unknown key in {path}; allowed are from and edit")
        _one_of(f"{place}.from", options.get("from"), trained)
        _one_of(f"{place}.edit", options.get("edit"), get_args(Edit))
        variants.append(Variant(name, (), options["from"], options["edit"]))
    return variants


def _one_of(key: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(key, value, f"must be one of {', '.join(allowed)}")


def _flags(options: Mapping[str, Any]) -> list[str]:
    """Options as a command line has them; true is a flag alone, false its negation."""
    flags: list[str] = []
    for key, value in options.items():
        name = str(key).lstrip("-").replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = value if isinstance(value, list) else [value]
            if name in MAPS:
                values = [",".join(map(str, values))]
            flags += [f"--{name}", *map(str, values)]
    return flags


def _check_names(names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        folder = folder_name(name)
        if not folder or folder in seen:
            other = f"as {seen[folder]!r} does" if folder else "which is none"
            raise ConfigError("runs", name, f"would be kept in the folder {folder!r}, {other}; give it another name")
        seen[folder] = name
