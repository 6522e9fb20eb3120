"""Rules of single options, from their facts: the range of each, and what it has no effect without."""

from __future__ import annotations

import math

from megatron_samoe.config.derived import flag
from megatron_samoe.config.option import LARGEST, all_options
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.config.rules import Problems
from megatron_samoe.errors import ConfigError, ConfigErrors

#: Of the tensors of a model: layers times experts.
_MOST_EXPERTS = 10_000_000


def _ranges(config: PretrainConfig, world_size: int) -> Problems:
    for _, name, value, _, facts in all_options(config):
        numbers = value if isinstance(value, tuple) else (value,)
        if facts.range is None or value is None:
            continue
        if not all(facts.range.is_legal(number) for number in numbers):
            yield ConfigError(flag(name), value, facts.range.words)


def _needs(config: PretrainConfig, world_size: int) -> Problems:
    for _, name, value, default, facts in all_options(config):
        if value != default and facts.needs is not None and facts.is_idle(config):
            yield ConfigError(flag(name), value, facts.needs.words.format(c=config))


RULES = (_ranges, _needs)
RANGES = (_ranges,)


def refuse_excess(config: PretrainConfig) -> None:
    """Raises ConfigErrors naming each number too large for any machine, before a model is built from it."""
    problems = []
    for _, name, value, _, facts in all_options(config):
        for number in value if isinstance(value, tuple) else (value,):
            most = facts.largest if isinstance(number, int) or facts.largest != LARGEST else 1e300
            if isinstance(number, (int, float)) and (most < number < math.inf or number < -LARGEST):
                problems.append(ConfigError(flag(name), value, f"must be at most {facts.largest:,}"))
    if not problems and config.model.num_layers * config.moe.most_experts > _MOST_EXPERTS:
        problems.append(ConfigError("--num-experts", config.moe.num_experts,
                                    f"times --num-layers must be at most {_MOST_EXPERTS:,}"))  # fmt: skip
    if problems:
        raise ConfigErrors(problems)
