"""Draws the list of faults, or runs tests on each of them: `python -m tests.faults draw`, `python -m tests.faults run`.

A run takes a copy of the project, plants one fault, and runs the tests likeliest to find it first; what it finds is
written down after each fault, so a run that ended goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.faults.draw import PACKAGE, draw

PROJECT = PACKAGE.parent
LIST = Path(__file__).parent / "faults.json"
#: For each room the tests that are likeliest to find its faults, the quickest first. The whole suite comes after them.
LIKELIEST = {
    "moe": ("tests/unit/moe", "tests/unit/models"),
    "distributed": ("tests/unit/distributed", "tests/unit/optimizer"),
    "tensor_parallel": ("tests/unit/tensor_parallel", "tests/unit/models"),
    "dist_checkpointing": ("tests/unit/dist_checkpointing",),
    "optimizer": ("tests/unit/optimizer", "tests/unit/training"),
    "models": ("tests/unit/models", "tests/unit/tensor_parallel"),
}


def plant(fault: dict[str, Any], project: Path) -> bool:
    """Writes a fault into a copy of the project; returns whether its line is still there."""
    path = project / fault["file"]
    lines = path.read_text().split("\n")
    places = [i for i, line in enumerate(lines) if line.strip() == fault["before"]]
    if not places:
        return False
    place = min(places, key=lambda i: abs(i + 1 - fault["line"]))
    indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
    lines[place] = indent + fault["after"]
    path.write_text("\n".join(lines))
    return True


def outcome(project: Path, tests: list[str], at_night: bool, timeout_s: float) -> tuple[str, str]:
    """Returns "found" and the test that failed, "survived", or "hung", of which a suite's time-out would tell."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", *tests]
    command += [] if at_night else ["-m", "not night"]
    environment = {**os.environ, "PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "hung", ""
    if process.returncode in (0, 5):
        return "survived", ""
    named = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "found", (named or output.splitlines()[-1:] or ["died"])[0][:200]


def run(results: Path, tests: list[str], only: list[int], at_night: bool, timeout_s: float) -> None:
    """Runs every fault of the list that has no result yet, or those of `only`."""
    faults = json.loads(LIST.read_text())["faults"]
    known = json.loads(results.read_text()) if results.exists() else {}
    for number, fault in enumerate(faults):
        if str(number) in known or (only and number not in only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            project = Path(folder) / "project"
            shutil.copytree(PROJECT, project, ignore=shutil.ignore_patterns(".git", ".venv", "build", "runs", "_build"))
            begun = time.monotonic()
            chosen = [*LIKELIEST[fault["file"].split("/")[1]], *tests]
            kind, test = outcome(project, chosen, at_night, timeout_s) if plant(fault, project) else ("gone", "")
        known[str(number)] = {"outcome": kind, "test": test, "seconds": round(time.monotonic() - begun)}
        results.write_text(json.dumps(known, indent=1))
        print(
            f"{number:3} {kind:9} {known[str(number)]['seconds']:4} s  {fault['file']}:{fault['line']}  {test}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("draw", "run"))
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--per-room", type=int, default=10)
    parser.add_argument("--results", type=Path, default=Path("faults-found.json"))
    parser.add_argument("--tests", nargs="*", default=["tests"], help="what is run after the likeliest tests")
    parser.add_argument("--only", nargs="*", type=int, default=[])
    parser.add_argument("--night", action="store_true", help="run what is marked for the night as well")
    parser.add_argument("--timeout-s", type=float, default=5400)
    options = parser.parse_args()
    if options.what == "draw":
        faults = draw(options.seed, options.per_room)
        LIST.write_text(
            json.dumps({"seed": options.seed, "per_room": options.per_room, "faults": faults}, indent=1) + "\n"
        )
        print(f"{len(faults)} faults in {LIST}")
    else:
        run(options.results, options.tests, options.only, options.night, options.timeout_s)


if __name__ == "__main__":
    main()
