"""Tables of cases, in YAML beside the tests that walk them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def table(of: str, tuples: bool = True) -> dict[str, Any]:
    """Returns the YAML file beside a module, given its `__file__`, without the keys that begin with a dot, which others merge.

    Args:
        tuples: whether lists become tuples, as options of several values are.
    """
    content = yaml.safe_load(Path(of).with_suffix(".yaml").read_text())
    kept = {name: value for name, value in content.items() if not name.startswith(".")}
    return _with_tuples(kept) if tuples else kept


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_tuples(inner) for name, inner in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
