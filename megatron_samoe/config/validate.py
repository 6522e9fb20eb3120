"""The check of a full configuration, which reports all errors at once.

Single options are held to their facts (`option.py`), several together to the rules of `config/rules`: `layout.py` refuses
layouts, `model.py` and `moe.py` models, and `run.py` anything else of a run.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from megatron_samoe.config.derived import with_train_iters
from megatron_samoe.config.option import LARGEST, Value, all_options, flag
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.rules import FromConfig, Table, layout, model, moe, run
from megatron_samoe.errors import ConfigError, ConfigErrors

TABLES: tuple[Table, ...] = (*model.TABLES, *moe.TABLES, *layout.TABLES, *run.TABLES)
#: Of the tensors of a model: layers times experts.
_MOST_EXPERTS = 10_000_000


def validate(config: PretrainConfig, world_size: int) -> None:
    """Raises ConfigErrors naming every rule that the configuration breaks on `world_size` ranks."""
    refuse_excess(config)
    ranges = dict(_ranges(config))
    groups = {group for group, _ in ranges}
    if groups.isdisjoint(("training", "parallel")):
        config = with_train_iters(config, world_size)
    problems = [*ranges.values(), *(error for *_, error in _idle(config))]
    for table in TABLES:
        if groups.isdisjoint(table.groups):
            problems += _broken(table, config, world_size)
    _raise_if_any(list({str(problem): problem for problem in problems}.values()))


def _broken(table: Table, config: PretrainConfig, world_size: int) -> list[ConfigError]:
    """Returns what a table refuses: of each option the first rule that is broken, or what its reading of a text raises."""
    found: dict[str, ConfigError] = {}
    if table.needs is not None and not table.needs.is_met(config):
        return []
    try:
        for rule in table.rules(config, world_size):
            if rule.is_broken and rule.option not in found:
                value = rule.value
                if value is FromConfig:
                    value = next(v for _, name, v, *_ in all_options(config) if name == rule.option)
                found[rule.option] = ConfigError(flag(rule.option), value, rule.allowed)
    except ConfigError as error:
        return [*found.values(), error]
    return list(found.values())


def refuse_wrong_numbers(config: PretrainConfig) -> None:
    """Raises ConfigErrors naming each number outside its own range, whatever the other options are."""
    refuse_excess(config)
    problems = list(dict(_ranges(config)).values())
    _raise_if_any(problems + _broken(moe.CHOICES, config, 1))


def _ranges(config: PretrainConfig) -> Iterator[tuple[tuple[str, str], ConfigError]]:
    for group, name, value, _, facts in all_options(config):
        numbers = value if isinstance(value, tuple) else (value,)
        if facts.range is None or value is None:
            continue
        if not all(facts.range.is_legal(number) for number in numbers):
            yield (group, name), ConfigError(flag(name), value, facts.range.words)


def _idle(config: PretrainConfig) -> Iterator[tuple[str, str, Value, ConfigError]]:
    """Yields group, name and default of each option that has no effect, because what it needs was not chosen, and its error."""
    for group, name, value, default, facts in all_options(config):
        if value != default and facts.is_idle(config):
            yield group, name, default, ConfigError(flag(name), value, facts.what_is_missing(config))


def refuse_idle(config: PretrainConfig, said: Mapping[str, str], replaced: frozenset[str]) -> None:
    """Raises ConfigErrors naming each option that somebody said and that has no effect, at its default or not: whoever said it
    meant something by it. None takes a file's value back and sets nothing.

    Args:
        said: who said an option; one of a "file" is not refused where something else replaced what it needs.
        replaced: options to which something else than the file gave a value.
    """
    _raise_if_any(
        [
            ConfigError(flag(name), value, facts.what_is_missing(config))
            for _, name, value, _, facts in all_options(config)
            if name in said and value is not None and not facts.has_effect(config)
            if said[name] == "flag" or (said[name] == "file" and replaced.isdisjoint(facts.reads))
        ]
    )


def without_idle_options(
    config: PretrainConfig, groups: Collection[str] = ("moe", "optimizer"), names: Collection[str] | None = None
) -> PretrainConfig:
    """Returns the configuration with each option of the groups, or of these names only, at its default that has no effect."""
    while True:
        idle = [
            (group, name, default)
            for group, name, default, _ in _idle(config)
            if group in groups and (names is None or name in names)
        ]
        if not idle:
            return config
        for group, name, default in idle:
            options = replace(getattr(config, group), **{name: default})
            config = replace(config, **{group: options})


def refuse_excess(config: PretrainConfig) -> None:
    """Raises ConfigErrors naming each number too large for any machine, before a model is built from it."""
    problems = []
    for _, name, value, _, facts in all_options(config):
        for number in value if isinstance(value, tuple) else (value,):
            most = facts.largest if isinstance(number, int) or facts.largest != LARGEST else 1e300
            if isinstance(number, (int, float)) and (most < number < math.inf or number < -LARGEST):
                problems.append(ConfigError(flag(name), value, f"must be at most {facts.largest:,}"))
    if not problems and config.model.num_layers * config.moe.most_experts > _MOST_EXPERTS:
        allowed = f"times --num-layers must be at most {_MOST_EXPERTS:,}"
        problems.append(ConfigError("--num-experts", config.moe.num_experts, allowed))
    _raise_if_any(problems)


def _raise_if_any(problems: list[ConfigError]) -> None:
    if problems:
        raise ConfigErrors(problems)


def refuse_unknown(config: PretrainConfig, reader: str, doing: str) -> None:
    """Raises ConfigErrors naming each option of the model, with a value other than its default, that a reader does not
    know.

    Args:
        reader: one of `option.READERS`.
        doing: what the reader does, for the message.
    """
    problems = [
        ConfigError(flag(name), value, f"is not known to {doing}")
        for group, name, value, default, facts in all_options(config)
        if group in ("model", "moe") and value != default and reader not in facts.readers_of(value)
    ]
    if problems:
        raise ConfigErrors(problems)
