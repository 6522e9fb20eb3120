"""Runs the tests of options with the option ignored, in a copy of the project: `python -m tests.options [OPTION ...]`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.options.table import ROWS, Copy

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, Copy(Path(folder)) as copy:
        for name in sys.argv[1:] or ROWS:
            print(f"{name}: {copy.problem_of(name) or 'is seen'}", flush=True)
