"""Former names of modules and of what is in them: using one warns, and gives what has the new name."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = "megatron_samoe"


class _Moved(MetaPathFinder, Loader):
    def __init__(self, old: str, new_of: Mapping[str, str]):
        self._new_of = {f"{old}.{name}": f"{PACKAGE}.{new}" for name, new in new_of.items()}

    def _new_name(self, name: str) -> str | None:
        """Returns what a module, or the nearest package above it that has moved, is called now."""
        above, below = name, ""
        while above not in self._new_of:
            above, dot, last = above.rpartition(".")
            if not dot:
                return None
            below = f".{last}{below}"
        return self._new_of[above] + below

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if self._new_name(fullname) else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = self._new_name(old)
        assert new is not None
        warnings.warn(f"{old} is now {new}; version 0.3 knows only the new name.", FutureWarning, stacklevel=2)
        # The import system takes this entry when the loader is done.
        sys.modules[old] = importlib.import_module(new)


def modules_moved(old: str, new_of: Mapping[str, str]) -> list[str]:
    """Makes the modules below a former package known, and returns its `__path__`, which has no folder.

    Args:
        new_of: new names, below this package, of the modules and packages that were below `old`.
    """
    # First: a former package is the new one in `sys.modules`, whose folder would give its modules a second time.
    sys.meta_path.insert(0, _Moved(old, new_of))
    return []


def names_moved(module: str, new_of: Mapping[str, type]) -> Callable[[str], type]:
    """Returns the `__getattr__` of a module that knows former names: of each, what it is called now."""

    def former(name: str) -> type:
        if name not in new_of:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = new_of[name]
        message = f"{module}.{name} is now {new.__name__}; version 0.3 knows only the new name."
        warnings.warn(message, FutureWarning, stacklevel=2)
        return new

    return former
