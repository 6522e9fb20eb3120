"""A study as its YAML file describes it, and the runs that it consists of."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_samoe.config.cli import read_yaml
from megatron_samoe.errors import ConfigError, nearest

Edit = Literal["select", "fold"]
Choice = Literal["vertex", "tried"]


@dataclass(frozen=True)
class Variant:
    """One model of a study.

    Attributes:
        flags: of pretraining, beyond the study's configuration.
        edited_from: name of the variant whose trained checkpoints are edited; this one is not trained then.
        edit: what is done to them, an action of `megatron-samoe edit`.
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
class Sweep:
    """An option whose best value is found for each variant and size before it is trained in full.

    Attributes:
        option: of pretraining, without dashes, such as lr.
        values: rising, the first that are tried.
        train_iters: length of the sweep's runs; None for that of the study.
        seeds: of the sweep's runs.
        extensions: how often the range grows by a value where the best lies at its edge.
        choose: the parabola's vertex, or the best value that was tried, whose runs then need not be trained again.
    """

    option: str
    values: tuple[float, ...]
    train_iters: int | None
    seeds: tuple[int, ...]
    extensions: int = 2
    choose: Choice = "vertex"

    def concerns(self, variant: Variant) -> bool:
        """Whether the option is swept for a variant: not where its own flags fix it."""
        return variant.is_trained and f"--{self.option}" not in variant.flags


@dataclass(frozen=True)
class Gate:
    """What must hold before a study goes on.

    Attributes:
        arm, baseline: names of variants.
        at_most: largest difference of mean validation losses, in nats.
        load_entropy, by_step: the least load entropy of any layer that the arm must have reached at that step.
    """

    arm: str
    baseline: str
    at_most: float | None
    load_entropy: float | None
    by_step: int | None


@dataclass(frozen=True)
class Study:
    """The content of a study's file.

    Attributes:
        config: YAML file of options that all runs share.
        baseline: name of the variant that the others are compared with.
        variants: trained ones first.
        margin: nats per token within which two models count as equally good.
        sizes: flags of each size by name; one without name or flags if the file has none. The first is the study's own.
        branches: shorter lengths, in steps, whose runs leave the full one where their decay begins.
        give_up: nats; a variant whose first seed ends more than that behind the baseline gets no other seed.
    """

    title: str
    config: Path
    seeds: tuple[int, ...]
    baseline: str
    variants: tuple[Variant, ...]
    margin: float = 0.02
    sizes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"": ()})
    sweep: Sweep | None = None
    branches: tuple[int, ...] = ()
    gates: tuple[Gate, ...] = ()
    give_up: float | None = None


@dataclass(frozen=True)
class Run:
    """A variant with one seed, in a folder of its own.

    Attributes:
        size: name of a size of the study.
        swept: value of the sweep's option; None for the runs that the sweep is for.
        length: steps of a branch; None for a run of full length.
    """

    variant: Variant
    seed: int
    directory: Path
    size: str = ""
    swept: float | None = None
    length: int | None = None

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.directory / "checkpoints"

    @property
    def label(self) -> str:
        """The run in a few words."""
        words = [self.variant.name, self.size, f"seed {self.seed}"]
        words += [f"at {self.swept:g}"] if self.swept is not None else []
        words += [f"{self.length} steps"] if self.length is not None else []
        return ", ".join(word for word in words if word)


def plan_runs(study: Study, root: Path) -> list[Run]:
    """Returns all runs but a sweep's in the order in which they are made: seeds outermost, so that a study cut short is a
    whole one of fewer seeds; edited variants after the one they come from, branches before the run that they leave."""
    return [
        Run(variant, seed, _folder(root, variant, size) / (f"seed-{seed}" if n is None else f"steps-{n}/seed-{seed}"), size,
            length=n)
        for seed in study.seeds
        for size in study.sizes
        for variant in study.variants
        for n in (*(study.branches if variant.is_trained else ()), None)
    ]  # fmt: skip


def sweep_runs(study: Study, root: Path, variant: Variant, size: str, values: Sequence[float]) -> list[Run]:
    """Returns the runs of a sweep for one variant and size."""
    assert study.sweep is not None
    return [
        Run(variant, seed, _folder(root, variant, size) / f"{study.sweep.option}-{value:g}" / f"seed-{seed}", size, value)
        for value in values
        for seed in study.sweep.seeds
    ]  # fmt: skip


def _folder(root: Path, variant: Variant, size: str) -> Path:
    return root / folder_name(size) / folder_name(variant.name) if size else root / folder_name(variant.name)


def folder_name(variant: str) -> str:
    """Returns a variant's name as a folder: `samoe, one bank` is in `samoe-one-bank`."""
    return re.sub(r"[^a-z0-9.]+", "-", variant.lower()).strip("-")


#: Options that are one word with an entry for each layer, which a study may write as a list.
MAPS = ("expert-sharing",)
_KEYS = ("title", "config", "seeds", "baseline", "margin", "runs", "derived", "sizes", "sweep", "branches", "gates",
         "give-up")  # fmt: skip


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
    variants = [Variant(name, tuple(as_flags(options))) for name, options in _mapping(content, "runs", path).items()]
    variants += _edited(_mapping(content, "derived", path), [v.name for v in variants], path)
    names = [v.name for v in variants]
    _check_names(names)
    baseline = content.get("baseline", names[0])
    _one_of("baseline", baseline, names)
    sizes = {name: tuple(as_flags(options)) for name, options in _mapping(content, "sizes", path).items()} or {"": ()}
    return Study(
        str(content["title"]), config, tuple(seeds), baseline, tuple(variants),
        _number("margin", content.get("margin", 0.02)), sizes, _sweep(content.get("sweep"), path),
        _branches(content.get("branches"), path), _gates(content.get("gates"), names, path),
        None if content.get("give-up") is None else _number("give-up", content["give-up"]),
    )  # fmt: skip


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


def _sweep(content: Any, path: Path) -> Sweep | None:
    if content is None:
        return None
    known = ("option", "values", "train-iters", "seeds", "extensions", "choose")
    _keys("sweep", content, known, path, needed=("option", "values"))
    values = content["values"]
    if not isinstance(values, list) or len(values) < 3:
        raise ConfigError("sweep.values", values, "must be at least 3 numbers: a parabola is put through them")
    numbers = [_number("sweep.values", value) for value in values]
    if numbers != sorted(set(numbers)) or numbers[0] <= 0:
        raise ConfigError("sweep.values", values, "must rise and be positive")
    seeds = content.get("seeds", [1])
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int for s in seeds):
        raise ConfigError("sweep.seeds", seeds, "must be whole numbers")
    iterations = content.get("train-iters")
    if iterations is not None:
        _positive("sweep.train-iters", iterations)
    extensions = content.get("extensions", 2)
    if type(extensions) is not int or extensions < 0:
        raise ConfigError("sweep.extensions", extensions, "must be a whole number, 0 or more")
    choose = content.get("choose", "vertex")
    _one_of("sweep.choose", choose, get_args(Choice))
    option = str(content["option"]).lstrip("-").replace("_", "-")
    return Sweep(option, tuple(numbers), iterations, tuple(seeds), extensions, choose)


def _branches(content: Any, path: Path) -> tuple[int, ...]:
    if content is None:
        return ()
    if not isinstance(content, list) or content != sorted(set(content)):
        raise ConfigError("branches", content, f"must be rising numbers of steps in {path}")
    for length in content:
        _positive("branches", length)
    return tuple(content)


def _gates(content: Any, names: Sequence[str], path: Path) -> tuple[Gate, ...]:
    if content is not None and not isinstance(content, list):
        raise ConfigError("gates", content, f"must be a list in {path}")
    gates = []
    for number, gate in enumerate(content or [], start=1):
        place = f"gates.{number}"
        _keys(place, gate, ("arm", "baseline", "at-most", "load-entropy", "by-step"), path, needed=("arm",))
        _one_of(f"{place}.arm", gate["arm"], names)
        baseline = gate.get("baseline", gate["arm"])
        _one_of(f"{place}.baseline", baseline, names)
        numbers = {
            key: None if gate.get(key) is None else _number(f"{place}.{key}", gate[key])
            for key in ("at-most", "load-entropy", "by-step")
        }
        if numbers["at-most"] is None and numbers["load-entropy"] is None:
            raise ConfigError(place, gate, "asks for nothing; give at-most or load-entropy")
        step = numbers["by-step"]
        gates.append(
            Gate(
                gate["arm"], baseline, numbers["at-most"], numbers["load-entropy"], None if step is None else int(step)
            )
        )
    return tuple(gates)


def _keys(place: str, content: Any, known: Sequence[str], path: Path, needed: Sequence[str]) -> None:
    if not isinstance(content, dict):
        raise ConfigError(place, content, f"must be a mapping in {path}")
    for key in content:
        if key not in known:
            raise ConfigError(f"{place}.{key}", content[key], f"unknown key in {path}.{nearest(str(key), known)}")
    for key in needed:
        if key not in content:
            raise ConfigError(f"{place}.{key}", None, f"missing in {path}")


def _number(place: str, value: Any) -> float:
    try:  # YAML reads 3e-3 as text, and 3.0e-3 as a number
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(place, value, "must be a number")
    return number


def _positive(place: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ConfigError(place, value, "must be a positive whole number")


def _one_of(key: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(key, value, f"must be one of {', '.join(allowed)}")


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """Returns options as a command line has them; true is a flag alone, false its negation."""
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
