"""Programs end when the one that started them does, however that ends, and nothing here starts one in another way."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_samoe import children
from tests.harness.serving import wait_for

ROOT = Path(children.__file__).parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's end")
#: Starts a program that says when it is there and how it was ended, then waits to be ended itself.
PARENT = """
import signal, sys
from megatron_samoe import children
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a suite under nohup ignores it
program = "trap 'touch ended; exit' TERM; touch ready; while :; do sleep 0.02; done"
children.start(["sh", "-c", program])
sys.stdin.readline()
"""


@linux
@pytest.mark.parametrize("number", [None, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_program_is_told_of_its_parents_end(tmp_path: Path, number: signal.Signals | None) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    parent = subprocess.Popen(
        [sys.executable, "-S", "-c", PARENT], stdin=subprocess.PIPE, cwd=tmp_path, env=environment
    )
    wait_for((tmp_path / "ready").exists)
    assert not (tmp_path / "ended").exists()
    if number is None:
        parent.communicate(b"\n")  # it comes to its end by itself
    else:
        parent.send_signal(number)
    parent.wait(30)
    wait_for((tmp_path / "ended").exists)


@linux
def test_a_program_whose_parent_is_gone_does_not_start(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", children.__file__, str(os.getpid() + 1), "0", "touch", "started"]
    assert subprocess.run(command, cwd=tmp_path).returncode == -signal.SIGTERM
    assert not (tmp_path / "started").exists()


def test_it_is_as_if_the_program_were_started_itself(tmp_path: Path) -> None:
    done = children.run(["sh", "-c", "pwd; exit 3"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (3, str(tmp_path.resolve()), "")
    program = children.start(["sh", "-c", "echo $$; nice"], idle=True, stdout=subprocess.PIPE, text=True)
    said, _ = program.communicate()
    assert said.split() == [str(program.pid), "19"]
    done = children.run(["no-such-program"], capture_output=True, text=True)
    assert done.returncode == 1 and "error: no-such-program cannot be started" in done.stderr


@linux
@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel does not group by sessions")
def test_only_a_session_of_its_own_steps_behind_others() -> None:
    command = ["sed", "s/.* //", "/proc/self/autogroup"]
    before = children.run(command, capture_output=True, text=True).stdout
    for own_session, expected in ((True, "19\n"), (False, before)):
        program = children.start(command, idle=True, start_new_session=own_session, stdout=subprocess.PIPE, text=True)
        assert program.communicate()[0] == expected


def starts(tree: ast.AST) -> list[int]:
    """Returns the lines on which a file starts a program by Python's own means."""
    means = {
        "subprocess": {"run", "Popen", "call", "check_call", "check_output"},
        "os": {"system", "popen", "posix_spawn"},
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.attr in means.get(node.func.value.id, ())
    ]


def test_nothing_starts_a_program_in_another_way() -> None:
    found = {path: starts(ast.parse(path.read_text())) for path in sorted(ROOT.rglob("*.py"))}
    assert found.pop(Path(children.__file__)), "the rule sees no start at all"
    assert not [f"{path.relative_to(ROOT)}:{line}" for path, lines in found.items() for line in lines]
