"""A study as its YAML file describes it, and the runs that it consists of."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from megatron_samoe.config.cli import read_yaml, stated_in_mapping
from megatron_samoe.config.typed import typed
from megatron_samoe.errors import ConfigError

Edit = Literal["select", "fold"]
Choice = Literal["vertex", "tried"]
#: Options of pretraining by name.
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """One model of a study.

    Attributes:
        options: of pretraining, beyond the study's configuration.
        edited_from: name of the variant whose trained checkpoints are edited; this one is not trained then.
        edit: what is done to them, an action of `megatron-samoe edit`.
    """

    name: str
    options: Options
    edited_from: str | None = None
    edit: Edit | None = None

    @property
    def is_trained(self) -> bool:
        """Whether it is trained itself, and not made of another by editing."""
        return self.edited_from is None


@dataclass(frozen=True)
class Derived:
    """A variant that is made of a trained one, see `Variant`."""

    from_: str
    edit: Edit


@dataclass(frozen=True)
class Sweep:
    """An option whose best value is found for each variant and size before it is trained in full.

    Attributes:
        option: of pretraining, without dashes, such as lr.
        values: rising, the first that are tried.
        train_iters: length of the sweep's runs; None for that of the study.
        seeds: of the sweep's runs.
        extensions: how often the range grows by a value where the best is at its edge.
        choose: the parabola's vertex, or the best value that was tried, whose runs then need not be trained again.
    """

    option: str
    values: tuple[float, ...]
    train_iters: int | None = None
    seeds: tuple[int, ...] = (1,)
    extensions: int = 2
    choose: Choice = "vertex"

    def concerns(self, variant: Variant) -> bool:
        """Whether the option is swept for a variant: not where its own options fix it."""
        return variant.is_trained and self.option.replace("-", "_") not in stated_in_mapping(variant.options)


@dataclass(frozen=True)
class Gate:
    """A condition for a study to continue.

    Attributes:
        arm, baseline: names of variants; the arm itself where no baseline is given.
        at_most: largest difference of mean validation losses, in nats.
        load_entropy, by_step: the least load entropy of any layer that the arm must have reached at that step.
    """

    arm: str
    baseline: str = ""
    at_most: float | None = None
    load_entropy: float | None = None
    by_step: int | None = None


@dataclass(frozen=True)
class Study:
    """The content of a study's file.

    Attributes:
        config: YAML file of options that all runs share.
        runs: options of each trained variant, beyond the configuration.
        baseline: name of the variant that the others are compared with; the first by default.
        margin: nats per token within which two models count as equally good.
        sizes: options of each size by name; one without name or options if the file has none. The first is the study's own.
        give_up: nats; a variant whose first seed ends more than that behind the baseline gets no other seed.
    """

    title: str
    config: Path
    seeds: tuple[int, ...]
    runs: Mapping[str, Options]
    baseline: str = ""
    margin: float = 0.02
    derived: Mapping[str, Derived] = field(default_factory=dict)
    sizes: Mapping[str, Options] = field(default_factory=dict)
    sweep: Sweep | None = None
    gates: tuple[Gate, ...] = ()
    give_up: float | None = None

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """All models, trained ones first."""
        trained = [Variant(name, options) for name, options in self.runs.items()]
        return (*trained, *(Variant(name, {}, made.from_, made.edit) for name, made in self.derived.items()))


@dataclass(frozen=True)
class Run:
    """A variant with one seed, in a folder of its own.

    Attributes:
        size: name of a size of the study.
        swept: value of the sweep's option; None for the runs that the sweep is for.
    """

    variant: Variant
    seed: int
    directory: Path
    size: str = ""
    swept: float | None = None

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.directory / "checkpoints"

    @property
    def label(self) -> str:
        """The run in a few words."""
        words = [self.variant.name, self.size, f"seed {self.seed}"]
        words += [f"at {self.swept:g}"] if self.swept is not None else []
        return ", ".join(word for word in words if word)


def plan_runs(study: Study, root: Path) -> list[Run]:
    """Returns all runs but a sweep's in the order in which they are made: seeds outermost, so that a study cut short is a
    complete one of fewer seeds; edited variants after the one they come from."""
    return [
        Run(variant, seed, _folder(root, variant, size) / f"seed-{seed}", size)
        for seed in study.seeds
        for size in study.sizes
        for variant in study.variants
    ]


def sweep_runs(study: Study, root: Path, variant: Variant, size: str, values: Sequence[float]) -> list[Run]:
    """Returns the runs of a sweep for one variant and size."""
    assert study.sweep is not None
    folders = {value: _folder(root, variant, size) / f"{study.sweep.option}-{value:g}" for value in values}
    return [
        Run(variant, seed, folder / f"seed-{seed}", size, value)
        for value, folder in folders.items()
        for seed in study.sweep.seeds
    ]


def _folder(root: Path, variant: Variant, size: str) -> Path:
    return root / folder_name(size) / folder_name(variant.name) if size else root / folder_name(variant.name)


def folder_name(variant: str) -> str:
    """Returns a variant's name as a folder: `samoe, one bank` is in `samoe-one-bank`."""
    return re.sub(r"[^a-z0-9.]+", "-", variant.lower()).strip("-")


def read_study(path: Path, seeds: Sequence[int] | None = None) -> Study:
    """Returns the study that a YAML file describes, with other seeds if some are given.

    Raises:
        ConfigError: the file is not a study; the message names the key.
    """
    content = read_yaml(path)
    if "branches" in content:
        raise ConfigError(
            "branches", content["branches"], "lengths are sizes now, such as sizes: {375 steps: {train-iters: 375}}"
        )
    found = typed(Study, content, str(path))
    sweep = found.sweep and replace(found.sweep, option=found.sweep.option.lstrip("-").replace("_", "-"))
    study = replace(
        found,
        config=path.parent / found.config,
        seeds=tuple(seeds or found.seeds),
        baseline=found.baseline or next(iter(found.runs), ""),
        sizes=found.sizes or {"": {}},
        sweep=sweep,
    )
    for key, value, is_right, allowed in _rules(study):
        if not is_right:
            raise ConfigError(key, value, f"{allowed}, in {path}")
    _check_names(study)
    return study


def _rules(study: Study) -> Iterator[tuple[str, object, bool, str]]:
    """Yields (key, value, whether it is right, what is allowed) of what its type does not say."""
    names = [v.name for v in study.variants]
    one_of = f"must be one of {', '.join(names)}"
    yield "runs", study.runs, bool(study.runs), "must name at least one model"
    yield "seeds", study.seeds, _are_different(study.seeds), "must be different whole numbers, there or after --seeds"
    # A name that no file can have is not a file, either.
    yield "config", str(study.config), os.path.isfile(study.config), "no such file"
    yield "baseline", study.baseline, study.baseline in names, one_of
    yield "margin", study.margin, _are_finite(study.margin), "must be a number"
    yield "give-up", study.give_up, _are_finite(study.give_up), "must be a number"
    for name, made in study.derived.items():
        known = ", ".join(study.runs)
        yield f"derived.{name}.from", made.from_, made.from_ in study.runs, f"must be one of {known}"
    sweep = study.sweep
    if sweep is not None:
        at_least = "must be at least 3 rising positive numbers: a parabola is put through them"
        yield "sweep.values", sweep.values, len(sweep.values) >= 3 and _rise(sweep.values), at_least
        yield "sweep.seeds", sweep.seeds, _are_different(sweep.seeds), "must be different whole numbers"
        yield (
            "sweep.train-iters",
            sweep.train_iters,
            sweep.train_iters is None or sweep.train_iters > 0,
            "must be positive",
        )
        yield "sweep.extensions", sweep.extensions, sweep.extensions >= 0, "must be 0 or more"
    for number, gate in enumerate(study.gates, start=1):
        asks = (gate.at_most, gate.load_entropy)
        yield f"gates.{number}.arm", gate.arm, gate.arm in names, one_of
        yield f"gates.{number}.baseline", gate.baseline, gate.baseline in ("", *names), one_of
        yield f"gates.{number}", gate, asks != (None, None), "asks for nothing; give at-most or load-entropy"
        yield f"gates.{number}", gate, _are_finite(*asks), "must have finite numbers"


def _are_finite(*values: float | None) -> bool:
    return all(value is None or math.isfinite(value) for value in values)


def _are_different(values: Sequence[int]) -> bool:
    return 0 < len(values) == len(set(values))


def _rise(values: Sequence[float]) -> bool:
    return _are_finite(*values) and all(a < b for a, b in pairwise((0, *values)))


def _check_names(study: Study) -> None:
    seen: dict[str, str] = {}
    for name in (v.name for v in study.variants):
        folder = folder_name(name)
        if not folder or folder in seen:
            other = f"as {seen[folder]!r} does" if folder else "which is none"
            raise ConfigError("runs", name, f"would be kept in the folder {folder!r}, {other}; give it another name")
        seen[folder] = name
