"""Draws mutants, runs the tests on them, or shows the score: `python -m tests.mutants draw`, `run`, `table`.

`draw` adds to a list, which the results join. `run` changes one place at a time in a copy of the project, and runs the day's
tests of the changed module, the likeliest first; `run --day` runs every test on those that survived. A run that ended goes on
where it was. A mutant's "equivalent" is the argument why no test can find it; it is not run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.mutants import PROJECT, Mutant, room_of

LIST = Path(__file__).with_name("mutants.json")
#: Trainings of every layout meet most of what these compute.
STEP = {"moe", "models", "tensor_parallel", "distributed", "optimizer", "pipeline_parallel", "parallel_state"}
DAY = ["tests", "-n", "logical", "--dist", "loadfile", "--no-loadscope-reorder"]


def planted(mutant: Mutant, text: str) -> str | None:
    """Returns a file's text with the mutant, at the place nearest to where it was drawn; None if its lines are gone."""
    lines, before = text.split("\n"), mutant["before"].split("\n")
    places = [i for i in range(len(lines)) if lines[i : i + len(before)] == before]
    place = min(places, key=lambda i: abs(i + 1 - mutant["line"]), default=None)
    return None if place is None else "\n".join([*lines[:place], mutant["after"], *lines[place + len(before) :]])


def likeliest(mutant: Mutant) -> list[str]:
    """Returns the tests' files that import the changed module or are of its room; those named like it, then those that import
    little, come first."""
    room, module = room_of(mutant["file"]), Path(mutant["file"]).stem
    package = mutant["file"].rpartition("/")[0].replace("/", ".")
    found = []
    for file in sorted(PROJECT.glob("tests/**/test_*.py")):
        text, in_room = file.read_text(), room in file.parts
        imports = f"{package}.{module}" in text or (f"from {package} import" in text and module in text)
        if imports or in_room or (room in STEP and file.stem == "test_layout_parity"):
            named = in_room and module in file.stem
            found.append((not named, not imports, text.count("megatron_samoe"), str(file.relative_to(PROJECT))))
    return [file for *_, file in sorted(found)]


def pytest(project: Path, tests: list[str], limit_s: float) -> tuple[str, str]:
    """Returns "found" and the test that failed, "survived", or "limit" if tests ran until then."""
    # The limit ends all processes of the group. Output goes to a file: a pipe would wait for those that have left it.
    command = ["timeout", "--signal=KILL", str(limit_s), sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "not night", *tests]
    environment = os.environ | {"PYTHONPATH": str(project)}
    with tempfile.TemporaryFile("w+") as log:
        code = subprocess.run(command, cwd=project, env=environment, stdout=log, stderr=log).returncode
        log.seek(0)
        output = log.read().splitlines()
    if code in (0, 5, -9, 137):
        return ("survived" if code in (0, 5) else "limit"), ""
    failed = [line.split()[1] for line in output if line.startswith(("FAILED ", "ERROR "))]
    return "found", (failed or output[-1:] or ["died"])[0]


def outcome(mutant: Mutant, project: Path, tests: list[str], limit_s: float) -> tuple[str, str]:
    """Returns what the tests say of a mutant; a test that fails without it as well says nothing."""
    path = project / mutant["file"]
    right = path.read_text() if path.exists() else ""
    wrong = planted(mutant, right)
    while wrong is not None:
        path.write_text(wrong)
        kind, test = pytest(project, tests, limit_s)
        path.write_text(right)
        if kind != "found" or "::" not in test or pytest(project, [test], limit_s)[0] == "survived":
            return kind, test
        tests = [*tests, "--deselect", test]
    return "gone", ""


def run(room: str | None, day: bool, limit_s: float) -> None:
    """Runs the mutants that have no outcome yet; with `day`, those that survived the tests of their module."""
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        shutil.copytree(PROJECT, project, ignore=shutil.ignore_patterns(".*", "build", "runs", "_build", "__pycache__"))
        for number, mutant in enumerate(json.loads(LIST.read_text())):
            waits = mutant.get("outcome") in (("survived", "limit") if day else (None,))
            if not waits or "equivalent" in mutant or room not in (None, room_of(mutant["file"])):
                continue
            begun = time.monotonic()
            kind, test = outcome(mutant, project, DAY if day else likeliest(mutant), limit_s)
            # Arguments may have been written into the list meanwhile.
            mutants = json.loads(LIST.read_text())
            mutants[number] |= {"outcome": kind + " the day" * (day and kind == "survived"), "by": test}
            write(mutants)
            took = f"{time.monotonic() - begun:4.0f} s"
            print(f"{number:3} {kind:9} {took}  {mutant['file']}:{mutant['line']}  {test}", flush=True)


def write(mutants: list[Mutant]) -> None:
    LIST.write_text(json.dumps(mutants, indent=1) + "\n")


def table(mutants: list[Mutant]) -> str:
    """Returns the score by room, in Markdown; what is equivalent or gone does not count."""
    rows: dict[str, Counter[str]] = {}
    for mutant in mutants:
        kind = "equivalent" if "equivalent" in mutant else mutant.get("outcome", "not run")
        for room in (room_of(mutant["file"]), "all"):
            rows.setdefault(room, Counter())[kind] += 1
    lines = ["| room | mutants | equivalent | found | score |", "|---|---|---|---|---|"]
    for room, kinds in sorted(rows.items(), key=lambda row: (row[0] == "all", row[0])):
        counted = kinds.total() - kinds["equivalent"] - kinds["gone"] - kinds["not run"]
        score = f"{kinds['found'] / counted:.0%}" if counted else ""
        lines.append(f"| {room} | {kinds.total()} | {kinds['equivalent']} | {kinds['found']} | {score} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("draw", "run", "table"))
    parser.add_argument("--seed", type=int, default=41)
    parser.add_argument("--number", type=int, default=60)
    parser.add_argument("--room", help="the only package or module whose mutants are run")
    parser.add_argument("--day", action="store_true", help="run every test of the day on mutants that survived")
    parser.add_argument("--limit-s", type=float, default=240, help="seconds of a mutant's tests")
    options = parser.parse_args()
    known: list[Mutant] = json.loads(LIST.read_text())
    if options.what == "draw":
        from tests.mutants.draw import draw

        drawn = [m for m in draw(options.seed, options.number) if not any(m.items() <= k.items() for k in known)]
        write([*known, *drawn])
        print(f"{len(drawn)} mutants joined the {len(known)} of {LIST}")
    elif options.what == "run":
        run(options.room, options.day, options.limit_s)
    else:
        print(table([m for m in known if m["seed"] == options.seed]))


if __name__ == "__main__":
    main()
