"""What every interpreter of a trial imports first (`table.ended`): the program reads one option as its default.

Validation, files of options and tests read what was given. So a test that fails saw what the option does, not the option.
"""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from typing import Any

from megatron_samoe.config import PretrainConfig

#: The option; and a file that gets the values in whose place the program read the default.
IGNORED, LOG = "SAMOE_IGNORED_OPTION", "SAMOE_IGNORED_VALUES"
#: Modules that pass options on or refuse them, and functions that do so in others: Python's own and facts of options.
PASSING = ("cli", "option", "saved", "schema", "typed", "validate", "rules", "needs")
#: Options that one of these modules itself goes by.
USED = {"use_checkpoint_args": "cli", "run_dir": "cli"}
MADE = ("__eq__", "__repr__", "__hash__", "__init__", "<lambda>")


def is_used(option: str, frame: Any) -> bool:
    """Returns whether the program, not what passes options on, reads an option there."""
    passing = [module for module in PASSING if module != USED.get(option)]
    if frame.f_globals.get("__name__", "").partition(".")[0] not in ("megatron_samoe", "__main__"):
        return False
    while frame is not None:
        package, _, module = frame.f_globals.get("__name__", "").partition(".config.")
        if package == "megatron_samoe" and (module.partition(".")[0] in passing or frame.f_code.co_name in MADE):
            return False
        frame = frame.f_back
    return True


def plant() -> None:
    """Changes how the group of the ignored option is read, in this process."""
    ignored = os.environ.get(IGNORED)
    for group in fields(PretrainConfig):
        cls: Any = type(getattr(PretrainConfig(), group.name))
        for field in fields(cls):
            if field.name == ignored:
                cls.__getattribute__ = _reader(ignored, field.default, os.environ[LOG])


def _reader(ignored: str, default: Any, log: str) -> Any:
    logged: set[str] = set()

    def read(self: Any, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name != ignored or value == default or not is_used(name, sys._getframe(1)):
            return value
        if repr(value) not in logged:
            logged.add(repr(value))
            with open(log, "a", encoding="utf-8") as file:
                file.write(f"{value!r}\n")
        return default

    return read


if IGNORED in os.environ:
    plant()
