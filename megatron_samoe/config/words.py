"""Messages in the words of whoever reads them: flags on a command line, fields in Python."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from megatron_samoe.config.option import all_options
from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.errors import ConfigError, ConfigErrors, MegatronSamoeError


def as_fields(text: str) -> str:
    """Returns a text in which flags of pretraining are the fields that they set: num_layers, not --num-layers."""
    names = {name for _, name, *_ in all_options(PretrainConfig())}
    return re.sub(r"--([a-z0-9-]*[a-z0-9])", lambda m: n if (n := m[1].replace("-", "_")) in names else m[0], text)


@contextlib.contextmanager
def in_python_words() -> Iterator[None]:
    """Lets the errors of a block name options by their fields."""
    try:
        yield
    except MegatronSamoeError as error:
        for each in (error, *(error.errors if isinstance(error, ConfigErrors) else ())):
            each.args = (as_fields(str(each)),)
            if isinstance(each, ConfigError):
                each.field, each.allowed = as_fields(each.field), as_fields(each.allowed)
        raise
