"""Draws mutants into a list, runs tests on them, or shows the score: `python -m tests.mutants draw`, `run`, `table`.

A run changes one place at a time in a copy of the project, and runs the day's tests of the changed module, the likeliest
first. It goes on where an earlier one ended. A mutant's "equivalent" is the argument why no test can find it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.mutants.draw import PROJECT, Mutant, draw

LIST = Path(__file__).with_name("mutants.json")
#: Rooms of what every step computes, which trainings of every layout meet.
STEP = ("moe", "models", "tensor_parallel", "distributed", "optimizer", "pipeline_parallel", "parallel_state")
DAY = ["tests", "-n", "logical", "--dist", "loadfile", "--no-loadscope-reorder"]


def planted(mutant: Mutant, text: str) -> str | None:
    """Returns a file's text with the mutant, at the place nearest to where it was drawn; None if its lines are gone."""
    lines, before = text.split("\n"), mutant["before"].split("\n")
    places = [i for i in range(len(lines)) if lines[i : i + len(before)] == before]
    place = min(places, key=lambda i: abs(i + 1 - mutant["line"]), default=None)
    return None if place is None else "\n".join([*lines[:place], mutant["after"], *lines[place + len(before) :]])


def likeliest(mutant: Mutant) -> list[str]:
    """Returns the files of tests that import the changed module, are of its room or have words of its path in their names;
    those of which most is true, then short ones, come first."""
    _, room, *modules = mutant["file"].removesuffix(".py").split("/")
    package, _, module = ".".join(["megatron_samoe", room, *modules]).rpartition(".")
    imports = re.compile(rf"\b{package}(\.| import .*\b){module}\b")
    found = []
    for file in sorted(PROJECT.glob("tests/**/test_*.py")):
        text = file.read_text()
        words = {*file.stem.split("_")} & {*"_".join([room, *modules]).split("_")}
        score = len(words) + (room in file.parts) + bool(imports.search(text))
        if score or (room in STEP and file.stem == "test_layout_parity"):
            found.append((-score, len(text), str(file.relative_to(PROJECT))))
    return [file for *_, file in sorted(found)]


def pytest(project: Path, tests: list[str], limit_s: int) -> tuple[str, str]:
    """Returns "found" and the test that failed, "survived", or "limit" if tests ran until then."""
    # The limit ends all processes of the group. Output goes to a file: a pipe would wait for those that have left it.
    command = ["timeout", "-sKILL", str(limit_s), sys.executable, "-m", "pytest", "-xm", "not night", *tests]
    with tempfile.TemporaryFile("w+") as log:
        environment = os.environ | {"PYTHONPATH": str(project)}
        code = subprocess.run(command, cwd=project, env=environment, stdout=log, stderr=log).returncode
        log.seek(0)
        failed = re.findall("^(?:FAILED|ERROR) (tests/.+?)(?: - |$)", log.read(), re.MULTILINE) or ["died"]
    return {0: ("survived", ""), 5: ("survived", ""), -9: ("limit", "")}.get(code, ("found", failed[0]))


def outcome(mutant: Mutant, project: Path, tests: list[str], limit_s: int) -> tuple[str, str]:
    """Returns what the tests say of a mutant: a test that fails without it as well says nothing, and what takes twice as long
    with it hangs."""
    path = project / mutant["file"]
    right = path.read_text() if path.exists() else ""
    wrong = planted(mutant, right)
    while wrong is not None:
        path.write_text(wrong)
        kind, test = pytest(project, tests, limit_s)
        path.write_text(right)
        if kind == "limit" and pytest(project, tests, limit_s // 2)[0] == "survived":
            return "found", "hangs"
        if kind != "found" or "::" not in test or pytest(project, [test], limit_s)[0] == "survived":
            return kind, test
        tests = [*tests, "--deselect", test]
    return "gone", ""


def run(room: str | None, day: bool) -> None:
    """Runs the mutants that have no outcome yet; with `day`, those that survived the tests of their module."""
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        shutil.copytree(PROJECT, project, ignore=shutil.ignore_patterns(".*", "build", "runs", "_build", "__pycache__"))
        for number, mutant in enumerate(json.loads(LIST.read_text())):
            waits = mutant.get("outcome") in (("survived", "limit") if day else (None,))
            if not waits or "equivalent" in mutant or room not in (None, mutant["file"].split("/")[1]):
                continue
            begun = time.monotonic()
            kind, test = outcome(mutant, project, *((DAY, 1800) if day else (likeliest(mutant), 240)))
            # Arguments may have been written into the list meanwhile.
            mutants = json.loads(LIST.read_text())
            mutants[number] |= {"outcome": kind + " the day" * (day and kind == "survived"), "by": test}
            LIST.write_text(json.dumps(mutants, indent=1) + "\n")
            print(f"{number:3} {kind:9} {time.monotonic() - begun:4.0f} s  {mutant['file']}  {test}", flush=True)


def table(mutants: list[Mutant]) -> str:
    """Returns the score by room, in Markdown; what is equivalent or gone does not count."""
    rows: dict[str, Counter[str]] = {}
    for mutant in mutants:
        kind = "equivalent" if "equivalent" in mutant else mutant.get("outcome", "not run")
        for room in (mutant["file"].split("/")[1], "all"):
            rows.setdefault(room, Counter())[kind] += 1
    lines = ["| room | mutants | equivalent | found | score |", "|---|---|---|---|---|"]
    for room, kinds in sorted(rows.items(), key=lambda row: (row[0] == "all", row[0])):
        counted = max(1, kinds.total() - kinds["equivalent"] - kinds["gone"] - kinds["not run"])
        entries = (room, kinds.total(), kinds["equivalent"], kinds["found"], f"{kinds['found'] / counted:.0%}")
        lines.append(f"| {' | '.join(map(str, entries))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("draw", "run", "table"))
    parser.add_argument("--seed", type=int, default=41, help="of the mutants that are drawn, or shown in the table")
    parser.add_argument("--number", type=int, default=60)
    parser.add_argument("--room", help="the only package or module whose mutants are run")
    parser.add_argument("--day", action="store_true", help="run every test of the day on mutants that survived")
    options = parser.parse_args()
    known: list[Mutant] = json.loads(LIST.read_text())
    if options.what == "draw":
        drawn = [m for m in draw(options.seed, options.number) if not any(m.items() <= k.items() for k in known)]
        LIST.write_text(json.dumps([*known, *drawn], indent=1) + "\n")
    if options.what == "run":
        run(options.room, options.day)
    print(table([m for m in json.loads(LIST.read_text()) if m["seed"] == options.seed]))


if __name__ == "__main__":
    main()
