"""Console output: one logger for the package, silent on all ranks but the first, and notes said once."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

logger = logging.getLogger("megatron_samoe")


class _StandardOutput(logging.StreamHandler):
    """Writes to what standard output is at the moment: notebooks and tests exchange it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout


def configure_logging(rank: int = 0) -> None:
    """Sends the package's messages to standard output on rank 0, warnings and errors on every rank."""
    if not logger.handlers:
        handler = _StandardOutput()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)


_said: set[str] = set()


def say_once(message: str) -> None:
    """Logs a message the first time this process logs it, on the first local rank only."""
    if message not in _said:
        _said.add(message)
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            logger.warning(message)
