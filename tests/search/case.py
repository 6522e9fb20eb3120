"""Configurations at random: any model, any way to train it, any legal layout.

Options come from the configuration's own fields, and their values from types and facts. So a new option is drawn as soon
as it exists; one whose type says too little fails a test until `VALUES` or `LEFT_OUT` names it.
"""

from __future__ import annotations

import json
import random
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megatron_samoe.config import ParallelConfig, PretrainConfig
from megatron_samoe.config.cli import apply_mapping
from megatron_samoe.config.derived import data_parallel_size
from megatron_samoe.config.option import Facts, all_options
from megatron_samoe.config.validate import validate
from megatron_samoe.errors import ConfigError, ConfigErrors
from tests.harness.tables import table
from tests.harness.tiny import tiny_config, with_options

#: What a case changes. So many ranks as there are may be data parallel, and a run must have some data.
BASE = with_options(tiny_config("dense"), micro_batch_size=1, mock_data=True)
BASE_VALUES = {name: value for _, name, value, _, _ in all_options(BASE)}

#: Groups of options that are not drawn, and single ones of the others.
LEFT_OUT = {name: reason for reason, names in table(__file__)["left out"].items() for name in names}

#: Values where a type says too little, or would make models that are no longer tiny or learn nothing.
VALUES: dict[str, tuple[Any, ...]] = table(__file__)["values"]

#: Drawn more often than one option in a hundred would be.
FREQUENT: tuple[str, ...] = table(__file__)["frequent"]
#: Trials of an option before it is given up.
TRIALS = 8


@dataclass(frozen=True)
class Case:
    """What is trained in a layout and in one process."""

    ranks: int
    precision: Literal["fp32", "fp64"] = "fp32"
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def config(self) -> PretrainConfig:
        """The configuration in its layout; ConfigError where an option is none or has no such type."""
        return apply_mapping(BASE, self.options, "the case")

    @property
    def in_one_process(self) -> PretrainConfig:
        """The same without a layout. Sequences that ranks compute at the same time may be balanced together, so that it
        computes as many at once."""
        at_once = self.config.training.micro_batch_size * data_parallel_size(self.config, self.ranks)
        return with_options(replace(self.config, parallel=ParallelConfig()), micro_batch_size=at_once)

    def problems(self) -> list[ConfigError]:
        """Returns why the case is not legal; nothing where it is."""
        try:
            validate(self.config, self.ranks)
            validate(self.in_one_process, 1)
        except ConfigErrors as found:
            return found.errors
        return []

    def changed(self, **options: Any) -> Case:
        """Returns the case with other values of options; those of `BASE` go without saying."""
        options = {**self.options, **options}
        return replace(self, options={name: value for name, value in options.items() if value != BASE_VALUES.get(name)})

    def without(self, *names: str) -> Case:
        """Returns the case without options, and without those that then have no effect."""
        options = {name: value for name, value in self.options.items() if name not in names}
        config = replace(self, options=options).config
        idle = [
            name
            for _, name, value, default, facts in all_options(config)
            if name in options and value != default and facts.needs and not facts.needs.is_met(config)
        ]
        return replace(self, options=options).without(*idle) if idle else replace(self, options=options)

    def is_part_of(self, other: Case) -> bool:
        """Whether the other case has all that this one has."""
        return (
            self.ranks <= other.ranks
            and self.precision == other.precision
            and self.options.items() <= other.options.items()
        )

    @property
    def command(self) -> str:
        """The command that repeats the case."""
        spec = {"ranks": self.ranks, "precision": self.precision, **self.options}
        return f"python -m tests.search --replay {shlex.quote(json.dumps(spec))}"

    @staticmethod
    def parse(spec: str) -> Case:
        """Returns the case of a command."""
        options = json.loads(spec)
        ranks, precision = options.pop("ranks"), options.pop("precision", "fp32")
        return Case(ranks, precision, {n: tuple(v) if isinstance(v, list) else v for n, v in options.items()})


@cache
def drawn_options() -> dict[str, str]:
    """Returns the group of each option that is drawn."""
    return {name: group for group, name, *_ in all_options(BASE) if group not in LEFT_OUT and name not in LEFT_OUT}


@cache
def values_of(name: str) -> tuple[Any, ...]:
    """Returns the values that an option is given; LookupError where neither its type nor `VALUES` says some."""
    group, _, base, default, facts = next(option for option in all_options(BASE) if option[1] == name)
    values = VALUES.get(name) or _values_of_type(get_type_hints(type(getattr(BASE, group)))[name], default, facts)
    return tuple(value for value in values if value != base)


def _values_of_type(hint: Any, default: Any, facts: Facts) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    if type(None) in get_args(hint):
        return tuple(v for h in get_args(hint) if h is not type(None) for v in _values_of_type(h, default, facts))
    numbers: dict[Any, tuple[Any, ...]] = {
        bool: (True, False),
        int: (1, 2, 3, 4, 8),
        float: (0.1, 0.5, 2.0) if not default else (0.5 * default, 2.0 * default),
    }
    if hint not in numbers:
        raise LookupError(f"an option of type {hint} and default {default!r} needs an entry in VALUES or LEFT_OUT")
    return tuple(v for v in numbers[hint] if facts.range is None or facts.range.is_legal(v))


def draw(rng: random.Random, most_ranks: int, refused: Counter[str]) -> Case:
    """Returns a legal case.

    Args:
        refused: counts, by reason, what was refused on the way.
    """
    layout = [name for name, group in drawn_options().items() if group == "parallel"]
    others = [name for name in drawn_options() if name not in layout]
    wanted = [
        *rng.sample(layout, rng.randint(1, 6)),
        *rng.sample(others, rng.randint(0, 8)),
        *(name for name in FREQUENT if rng.random() < 0.3),
    ]
    rng.shuffle(wanted)
    case = Case(rng.choice([n for n in (2, 3, 4, 4, 6, 8, 8) if n <= most_ranks]), rng.choice(("fp32", "fp64")))
    case = case.changed(expert_layout=rng.choice(("dense", "moe", "moe", "samoe")))
    for name in wanted:
        case = grown(case, name, rng, refused) or case
    return case


def grown(case: Case, name: str, rng: random.Random, refused: Counter[str]) -> Case | None:
    """Returns the case with one more option, and with those that the rules ask for beside it; None if none was found."""
    found: Case | None = case.changed(**{name: rng.choice(values_of(name))})
    for _ in range(TRIALS):
        if found is None or not (problems := found.problems()):
            return found
        refused[reason(problems[0])] += 1
        found = _without_problem(found, problems[0], name, rng)
    return None


def _without_problem(case: Case, problem: ConfigError, kept: str, rng: random.Random) -> Case | None:
    """Returns the case with another value of an option that a refusal names, where that ends it."""
    flags = re.findall(r"--[a-z0-9-]*[a-z0-9]", f"{problem.field} {problem.allowed}")
    names = {flag[2:].replace("-", "_") for flag in flags} & drawn_options().keys()
    changes = [(name, value) for name in sorted(names) for value in values_of(name)]
    changes += [(name, BASE_VALUES[name]) for name in sorted(names) if name in case.options and name != kept]
    for name, value in rng.sample(changes, len(changes)):
        changed = case.changed(**{name: value})
        if reason(problem) not in map(reason, changed.problems()):
            return changed
    return None


def reason(problem: ConfigError) -> str:
    """Returns why a case is refused, without its numbers."""
    return re.sub(r"(?<![\w-])\d+(?:[\d., x|]*\d)?(?!\w)", "N", f"{problem.field} {problem.allowed}")
