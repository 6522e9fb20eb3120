"""One command reaches every program, and says so in a line where there is none of that name; and what is so before torch is loaded."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_samoe.cli.command import COMMANDS, HEADS, module_of
from megatron_samoe.cli.completion import command_of
from megatron_samoe.cli.program import flags_of
from tests.harness.program import call

ROOT = Path(__file__).resolve().parents[3]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "megatron_samoe", *words], cwd=ROOT, capture_output=True, text=True)


def run_main(*words: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command's main in a fresh interpreter, which fails if torch is loaded at the end."""
    code = f"""
import atexit, os, sys
from megatron_samoe.cli import command
{before}
atexit.register(lambda: 'torch' in sys.modules and os._exit(9))
sys.argv = ['x', *{words!r}]
command.main()
"""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_help_lists_every_command_without_loading_torch() -> None:
    done = run_main("--help")
    assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in COMMANDS)
    assert all(f"\n{head}:\n  {name} " in done.stdout for name, head in HEADS.items())


def test_the_help_of_training_loads_no_torch() -> None:
    done = run_main("pretrain", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: megatron-samoe pretrain")
    assert "--num-expert-banks" in done.stdout


def test_a_terminal_hears_something_before_torch_is_loaded() -> None:
    done = run_main(
        "generate", before="sys.stderr.isatty = lambda: True; command.importlib.import_module = lambda _: sys.exit()"
    )
    assert done.returncode == 0 and done.stderr == "megatron-samoe generate: loading torch, which takes seconds\n"


def test_an_unknown_command_names_the_nearest() -> None:
    result = run("pretrian")
    assert result.returncode == 2 and result.stderr == "error: pretrian is not a command. Did you mean 'pretrain'?\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_program(name: str) -> None:
    assert callable(importlib.import_module(module_of(name)).main)
    assert "--help" in flags_of(command_of(name))


def test_a_command_names_itself_in_its_messages() -> None:
    result = run("merge", "--inptu", "x")
    assert result.returncode == 2 and "megatron-samoe merge" in result.stderr and "--input" in result.stderr


def test_completion_knows_commands_and_their_flags() -> None:
    script = call("megatron_samoe.cli.completion", "bash").stdout
    assert "train-tokenizer" in script and "--num-expert-banks" in script and "--output-prefix" in script


#: results_check.py looks at this repository's own pages, and is not a command.
TOOLS = sorted(path for path in (ROOT / "tools").glob("*.py") if path.stem not in ("results_check", "__init__"))


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_files_of_tools_are_one_line_programs(path: Path) -> None:
    text = path.read_text()
    module = text.rpartition('run("')[2].partition('"')[0]
    assert module in {module_of(name) for name in COMMANDS} and len(text.splitlines()) <= 14


def test_help_may_be_cut_by_head() -> None:
    command = f"{sys.executable} -m megatron_samoe pretrain --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: ") and not done.stderr


def test_a_wrong_value_comes_with_the_options_help() -> None:
    done = run("pretrain", "--num-layers", "x")
    assert done.returncode == 2 and "Number of transformer layers." in done.stderr + done.stdout


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


PROGRAMS = ("-m megatron_samoe pretrain", "-m megatron_samoe.cli.pretrain", "tools/evaluate.py")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc and prctl")
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_rank_dies_with_a_torchrun_that_is_killed_while_torch_is_loaded(program: str, tmp_path: Path) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text(
        f"import os, pathlib, time\npathlib.Path({str(tmp_path / 'loading')!r}).touch()\ntime.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}
    # A shell stands for torchrun: a parent that waits for its rank.
    command = f"{sys.executable} {program} --mock-data 2>/dev/null & echo $!; wait"
    launcher = subprocess.Popen(["sh", "-c", command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "loading").exists():
            assert launcher.poll() is None and time.monotonic() < deadline, "the rank did not come to load torch"
            time.sleep(0.01)
        launcher.kill()
        while is_running(rank):
            assert time.monotonic() < deadline, "a rank outlives its launcher"
            time.sleep(0.01)
    finally:
        launcher.kill()
        launcher.wait()
        if is_running(rank):
            os.kill(rank, signal.SIGKILL)
