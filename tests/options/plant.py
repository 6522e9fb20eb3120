"""What a copy of the project runs at the end of `megatron_samoe/config/__init__.py`: the program reads one option as its default.

Validation, files of options and tests see what was given. So a test that fails saw what the option does, not the option.
`OPTION_IGNORED` names the option. `OPTION_LOG` names a file for what the program reads of options that are not at their
defaults.
"""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from typing import Any

#: Modules that pass options on or refuse them, and functions that do so in others: Python's own and facts of options.
PASSING = ("cli", "option", "saved", "schema", "typed", "validate", "rules", "needs")
MADE = ("__eq__", "__repr__", "__hash__", "__init__", "<lambda>")


def is_used(frame: Any) -> bool:
    """Returns whether the program, not what passes options on, reads an option there."""
    if frame.f_globals.get("__name__", "").partition(".")[0] not in ("megatron_samoe", "__main__"):
        return False
    while frame is not None:
        package, _, module = frame.f_globals.get("__name__", "").partition(".config.")
        if package == "megatron_samoe" and (
            module.partition(".")[0] in PASSING or frame.f_code.co_name in MADE
        ):
            return False
        frame = frame.f_back
    return True


def plant(config: Any) -> None:
    """Changes how the groups of a configuration's class are read."""
    ignored, log = os.environ.get("OPTION_IGNORED"), os.environ.get("OPTION_LOG")
    for group in fields(config):
        cls: Any = type(getattr(config(), group.name))
        defaults = {f.name: f.default for f in fields(cls) if log or f.name == ignored}
        logged: set[tuple[str, ...]] = set()

        def read(self: Any, name: str, defaults: Any = defaults, logged: Any = logged) -> Any:
            value = object.__getattribute__(self, name)
            if name in defaults and value != defaults[name] and is_used(sys._getframe(1)):
                if not log:
                    return defaults[name]
                with open(log + ".test") as file:
                    entry = (name, repr(value), file.read())
                if entry not in logged:
                    logged.add(entry)
                    with open(log, "a") as file:
                        file.write("\t".join(entry) + "\n")
            return value

        if defaults:
            cls.__getattribute__ = read
