"""The launcher of registered runs: refuses code that is not registered, and notes what it ran."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.results import registered_run

PROGRAM = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
folder.mkdir(parents=True, exist_ok=True)
(folder / "machine.json").write_text(json.dumps({"forced": os.environ["MEGATRON_SAMOE_ISA"]}))
sys.exit(3)
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A folder of code under git, with a launcher in a tree beside it that registers its commit."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "trains.py").write_text(PROGRAM)
    git = ["git", "-C", str(code), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "tree/tools/results").mkdir(parents=True)
    (tmp_path / "tree/docs/results").mkdir(parents=True)
    (tmp_path / "tree/tools/results/registered_run.py").write_text(Path(registered_run.__file__).read_text())
    register(tmp_path, registered_run.code_of(code)["commit"])
    return code


def register(tmp_path: Path, commit: str) -> None:
    """Writes a registration of an edition without commits, and of one commit."""
    blocks = (
        "```yaml\ntag: x\nforced: {}\n```\n\n```yaml\ncommit: " + commit + "\nforced: {MEGATRON_SAMOE_ISA: avx2}\n```\n"
    )
    (tmp_path / "tree/docs/results/registration.md").write_text(blocks)


def launch(tmp_path: Path, code: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Starts the launcher in the folder of the code."""
    launcher = tmp_path / "tree/tools/results/registered_run.py"
    return subprocess.run([sys.executable, launcher, *words], cwd=code, capture_output=True, text=True)


def test_a_run_has_the_forced_environment_and_notes_its_commit(tmp_path: Path, code: Path) -> None:
    ran = launch(tmp_path, code, "-m", "trains", "--run-dir", str(tmp_path / "run"))
    assert ran.returncode == 3, "as the program ended"
    head = subprocess.run(["git", "-C", str(code), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert json.loads((tmp_path / "run/machine.json").read_text()) == {"forced": "avx2", "commit": head, "patch": ""}


def test_code_that_is_not_registered_is_refused(tmp_path: Path, code: Path) -> None:
    run = ("-m", "trains", "--run-dir", str(tmp_path / "run"))
    (code / "trains.py").write_text("print('changed')")
    assert "differ from commit" in launch(tmp_path, code, *run).stderr
    subprocess.run(["git", "-C", str(code), "checkout", "-q", "."], check=True)
    register(tmp_path, "a" * 40)
    assert f"registered are {'a' * 40}" in launch(tmp_path, code, *run).stderr
    assert "with --run-dir" in launch(tmp_path, code, "-m", "trains").stderr
    assert not (tmp_path / "run").exists()
