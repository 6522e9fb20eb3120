"""Runs the test of each option with the option ignored, in a copy of the project: `python -m tests.options OPTION ...`.

A test that passes then does not see the option. Within the copy, `python -m tests.options.runner` runs them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.options.table import ROWS, Copy

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, Copy(Path(folder)) as copy:
        problems = {name: copy.problem_of(name) for name in sys.argv[1:] or ROWS}
    for name, problem in problems.items():
        if problem:
            print(f"{name}: {problem}")
    sys.exit(any(problems.values()))
