"""Rules that a configuration must keep: small named functions of configuration and world size, in a file per kind.

Rules are arithmetic and run before any process group is made. A rule yields what is wrong and never raises. Where a
broken size makes its question meaningless it yields nothing, since another rule names that size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from megatron_samoe.config.pretrain import PretrainConfig
from megatron_samoe.errors import ConfigError

Problems: TypeAlias = Iterator[ConfigError]
Rule: TypeAlias = Callable[[PretrainConfig, int], Problems]
