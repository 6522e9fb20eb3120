"""Runs the tests of options with the option ignored: `python -m tests.options [OPTION ...]`."""

from __future__ import annotations

import sys

from tests.options.table import ROWS, problem_of

if __name__ == "__main__":
    for name in sys.argv[1:] or ROWS:
        print(f"{name}: {problem_of(name) or 'is seen'}", flush=True)
