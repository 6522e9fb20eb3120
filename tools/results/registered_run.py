#!/usr/bin/env python3
r"""Trains one run of a registered study on the registered commit, and notes in its machine.json which commit that was.

    git worktree add --detach ../code COMMIT && cd ../code && python setup.py build_ext --inplace
    PYTHONPATH=. python -m megatron_samoe.cli.study ../samoe/examples/studies/third_lock.yaml --num-threads 1 \
      --launcher "python ../samoe/tools/results/registered_run.py" --store ../samoe/docs/results/store ...

The folder that it is started in has the code. The commit must be one that docs/results/registration.md, of the tree that has this
file, registers, and no tracked file may differ from it. The environment is what the registration forces.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import yaml

REGISTRATION = Path(__file__).resolve().parents[2] / "docs/results/registration.md"


def code_of(folder: Path) -> dict[str, str]:
    """Returns the commit of a folder's code, and its tracked files' differences from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True, text=True).stdout

    return {"commit": git("rev-parse", "HEAD").strip(), "patch": git("diff", "HEAD")}


def forced_variables(code: dict[str, str]) -> dict[str, str]:
    """Returns the environment that the registration forces on runs of a commit; the program ends where it has no such commit."""
    pages = re.findall(r"^```yaml\n(.*?)^```", REGISTRATION.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    registered = {str(block["commit"]): block["forced"] for block in map(yaml.safe_load, pages) if "commit" in block}
    if code["commit"] not in registered:
        sys.exit(f"error: {os.getcwd()} has commit {code['commit']}; registered are {', '.join(registered)}")
    if code["patch"]:
        sys.exit(f"error: files in {os.getcwd()} differ from commit {code['commit']}; see git diff")
    return registered[code["commit"]]


def main(module: str, flags: list[str]) -> None:
    """Runs a module of the program as `python -m` does, and adds commit and patch to the machine.json of the run's folder."""
    code = code_of(Path.cwd())
    os.environ.update(forced_variables(code))
    sys.path[0], sys.argv = os.getcwd(), [module, *flags]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        machine = Path(flags[flags.index("--run-dir") + 1]) / "machine.json"
        if machine.is_file():
            facts = json.loads(machine.read_text(encoding="utf-8"))
            machine.write_text(json.dumps(facts | code, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] != ["-m"] or "--run-dir" not in sys.argv:
        sys.exit("error: give the words that follow `python`: -m MODULE FLAGS, with --run-dir")
    main(sys.argv[2], sys.argv[3:])
