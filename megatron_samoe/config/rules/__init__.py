"""Rules that a configuration must keep, a file per kind, each a small named function of configuration and world size.

They are arithmetic, run before any process group is made. A rule yields what is wrong and never raises; where a broken
size would make its own question meaningless it yields nothing, since another rule names that size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.errors import ConfigError

Problems: TypeAlias = Iterator[ConfigError]
Rule: TypeAlias = Callable[[PretrainConfig, int], Problems]
