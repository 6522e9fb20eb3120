"""The table of what each option does and the test that sees it, and a copy of the project in which an option is ignored."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any, NamedTuple

from tests.harness.tables import table

PROJECT = Path(__file__).resolve().parents[2]


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


class Copy:
    """A copy of the project whose program reads the default of one option, and a process that runs tests in it."""

    def __init__(self, folder: Path) -> None:
        ignored = shutil.ignore_patterns(".*", "build", "runs", "_build", "__pycache__")
        project = Path(shutil.copytree(PROJECT, folder / "project", ignore=ignored))
        with open(project / "megatron_samoe/config/__init__.py", "a", encoding="utf-8") as file:
            file.write("\nfrom tests.options.plant import plant\n\nplant(PretrainConfig)\n")
        environment, command = os.environ | {"PYTHONPATH": str(project)}, [sys.executable, "-m", "tests.options.runner"]
        self._process = Popen(command, cwd=project, env=environment, stdin=PIPE, stdout=PIPE, text=True)

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, option: str, test: str) -> dict[str, Any]:
        """Returns how a test ends with an option ignored; see `runner.ended`."""
        process = self._process
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps([option, test]) + "\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        return answer

    def problem_of(self, option: str) -> str:
        """Returns why an option's row shows nothing, or an empty text."""
        row = ROWS[option]
        found = self.ask(option, f"tests/{row.test}")
        # Without its path a program cannot go on.
        if found["outcome"] not in (("failed", "broke") if row.value is None else ("failed", "hangs")):
            return f"{row.test} {found['outcome']} although the program reads the default. {found['said']}"
        if row.value is not None and repr(row.value) not in found["values"]:
            return f"{row.test} gives it {', '.join(found['values'])}, not {row.value!r}"
        return ""
