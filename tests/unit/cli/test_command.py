"""One command reaches every program, and says so in a line where there is none of that name."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_samoe.cli.command import COMMANDS, HEADS, module_of
from megatron_samoe.cli.completion import command_of
from megatron_samoe.cli.program import flags_of

ROOT = Path(__file__).resolve().parents[3]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "megatron_samoe", *words], cwd=ROOT, capture_output=True, text=True)


def test_help_lists_every_command_without_loading_torch() -> None:
    code = "import sys; sys.argv = ['x', '--help']; from megatron_samoe.cli.command import main; main(); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout
    assert shown.strip().endswith("False")
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert all(f"\n{head}:\n  {name} " in shown for name, head in HEADS.items())


def test_the_help_of_training_loads_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['x', 'pretrain', '--help']; from megatron_samoe.cli.command import main\n"
        "try: main()\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout
    assert shown.startswith("usage: megatron-samoe pretrain") and "--num-expert-banks" in shown
    assert shown.strip().endswith("0 False")


def test_a_terminal_hears_something_before_torch_is_loaded() -> None:
    code = (
        "import sys; sys.argv = ['x', 'generate']; sys.stderr.isatty = lambda: True; from megatron_samoe.cli import command\n"
        "command.importlib.import_module = lambda name: sys.exit('torch' in sys.modules); command.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
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
    script = run("completion", "bash").stdout
    assert "train-tokenizer" in script and "--num-expert-banks" in script and "--output-prefix" in script


#: results_check.py looks at this repository's own pages, and is not a command.
PROGRAMS = sorted(path for path in (ROOT / "tools").glob("*.py") if path.stem not in ("results_check", "__init__"))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_files_of_tools_are_one_line_programs(path: Path) -> None:
    text = path.read_text()
    module = text.rpartition('run("')[2].partition('"')[0]
    assert module in {module_of(name) for name in COMMANDS} and len(text.splitlines()) <= 14
