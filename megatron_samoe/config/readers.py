"""The readers of a model besides training, and which of its options each knows."""

from __future__ import annotations

from megatron_samoe.config.derived import flag
from megatron_samoe.config.option import all_options
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.errors import ConfigError, ConfigErrors


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
