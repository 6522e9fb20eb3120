"""Options without effect, because what they need was not chosen.

One that a command line or a YAML file states is an error, even at its default: whoever wrote it meant something by it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from megatron_samoe.config.option import all_options, flag
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.errors import ConfigError, ConfigErrors

_GROUPS = tuple(f.name for f in dataclasses.fields(PretrainConfig))


def stated_in_args(args: Sequence[str]) -> frozenset[str]:
    """Returns the fields that flags name, those of booleans in either form."""
    names = {arg.partition("=")[0][2:].replace("-", "_") for arg in args if arg.startswith("--")}
    return frozenset(names | {name.removeprefix("no_") for name in names})


def stated_in_file(mapping: Mapping[str, Any]) -> frozenset[str]:
    """Returns the fields that a YAML file names; none of a whole saved configuration, which holds every default."""
    if all(isinstance(mapping.get(group), Mapping) for group in _GROUPS):
        return frozenset()
    inner = [key for group in mapping.values() if isinstance(group, Mapping) for key in group]
    return frozenset(str(key).replace("-", "_").lstrip("_") for key in [*mapping, *inner])


def with_implied_layout(config: PretrainConfig, stated: Collection[str]) -> PretrainConfig:
    """Returns the configuration with experts of each layer's own where their number is stated and no layout is."""
    if "num_experts" not in stated or "expert_layout" in stated:
        return config
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, expert_layout="moe"))


def idle_options(config: PretrainConfig, stated: Collection[str]) -> dict[str, ConfigError]:
    """Returns what each stated option lacks, for those that have no effect. None takes a file's value back and is no option."""
    return {
        name: ConfigError(flag(name), value, facts.needs.words.format(c=config))
        for _, name, value, _, facts in all_options(config)
        if name in stated and value is not None and facts.needs is not None and not facts.needs.is_met(config)
    }


def refuse_idle(config: PretrainConfig, stated: Collection[str]) -> None:
    """Raises ConfigErrors naming each stated option that has no effect."""
    problems = idle_options(config, stated)
    if problems:
        raise ConfigErrors(list(problems.values()))


def without_idle_options(
    config: PretrainConfig, groups: Collection[str] = ("moe", "optimizer"), names: Collection[str] | None = None
) -> PretrainConfig:
    """Returns the configuration with each option of the groups, or of these names alone, at its default that has no effect."""
    while True:
        idle = [
            (group, name, default)
            for group, name, value, default, facts in all_options(config)
            if group in groups and (names is None or name in names) and value != default and facts.is_idle(config)
        ]
        if not idle:
            return config
        for group, name, default in idle:
            options = dataclasses.replace(getattr(config, group), **{name: default})
            config = dataclasses.replace(config, **{group: options})
