"""The table of what each option does and the test that sees it, and the trial of that test with the option ignored."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tests.harness.tables import table
from tests.options.plant import IGNORED, LOG

PROJECT = Path(__file__).resolve().parents[2]
LIMIT_S = 240


class Row(NamedTuple):
    """What shows that an option does what it says.

    Attributes:
        value: one that the test gives it, neither the default nor an extreme; None for a path of the test's own.
        seen: the computed or written value that shows it, and by what it is judged.
        test: the test, below `tests`, that fails if the program reads the default instead.
    """

    value: Any
    seen: str
    test: str


_TABLE = table(str(Path(__file__).with_name("options.py")))
#: Options that no test sees in this way, with the reason.
LEFT: dict[str, str] = _TABLE.pop("left")
ROWS = {name: Row(*row) for name, row in _TABLE.items()}


def unlike(thing: Any, shows: dict[str, Any]) -> dict[str, Any]:
    """Returns those attributes of a thing that are not as a table says: equal, or with the text or the entries that it names."""

    def is_as_said(found: Any, said: Any) -> bool:
        if isinstance(found, dict):
            return bool(said.items() <= found.items())
        return bool(said in found if isinstance(found, str) else said == found)

    found = {name: getattr(thing, name) for name in shows}
    return {name: value for name, value in found.items() if not is_as_said(value, shows[name])}


def ended(option: str, test: str) -> tuple[str, str, list[str]]:
    """Returns how a test ends where the program reads the option's default, what was printed, and the values that were ignored."""
    with tempfile.TemporaryDirectory() as folder:
        # Every interpreter of the test, those of its ranks too, begins with it.
        Path(folder, "sitecustomize.py").write_text("import tests.options.plant\n")
        log = Path(folder, "values")
        paths = os.pathsep.join((folder, str(PROJECT)))
        environment = {**os.environ, "PYTHONPATH": paths, IGNORED: option, LOG: str(log)}
        pytest = [sys.executable, "-m", "pytest", "-q", "-n0", "-pno:cacheprovider", "-p", "tests.options.judge", test]
        # The limit ends all processes of the group.
        limited = ["timeout", "-sKILL", str(LIMIT_S), *pytest]
        done = subprocess.run(limited, cwd=PROJECT, env=environment, capture_output=True, text=True)
        values = sorted(set(log.read_text().splitlines())) if log.exists() else []
    said = re.findall("^@@(.*)$", done.stdout, re.MULTILINE) or ["hangs"]
    return said[-1], done.stdout[-2000:] + done.stderr[-1000:], values


def problem_of(option: str) -> str:
    """Returns why an option's row shows nothing, or an empty text."""
    row = ROWS[option]
    outcome, said, values = ended(option, f"tests/{row.test}")
    # Without its path a program cannot go on.
    if outcome not in (("failed", "broke") if row.value is None else ("failed", "hangs")):
        return f"{row.test} {outcome} although the program reads the default. {said}"
    if row.value is not None and repr(row.value) not in values:
        return f"{row.test} gives it {', '.join(values)}, not {row.value!r}"
    return ""
