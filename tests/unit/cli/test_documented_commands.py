"""Every command of the README, of docs/, and of files that users read exists, with the flags that it is shown with."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from pathlib import Path

import pytest

from megatron_samoe.cli import completion, program
from megatron_samoe.cli.command import COMMANDS, module_of
from megatron_samoe.config import PretrainConfig
from megatron_samoe.config.option import flag
from megatron_samoe.convert.target import how_to_train_on

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FILES = [
    *(path for path in sorted((ROOT / "examples").rglob("*")) if path.suffix in (".yaml", ".py", ".sh", ".conf")),
    *sorted((ROOT / "megatron_samoe/cli").glob("*.py")),
]
#: Commands that hand on what they do not know to pretraining.
HAND_ON = ("study", "plan")
PROGRAM = re.compile(
    r"(?:tools/(?P<tool>\w+)\.py|(?:-m megatron_samoe|megatron-samoe) (?P<command>[a-z][a-z-]+)|-m megatron_samoe\.cli\.(?P<module>\w+))"
)


@cache
def pretrain_flags() -> frozenset[str]:
    groups = [getattr(PretrainConfig(), f.name) for f in dataclasses.fields(PretrainConfig)]
    return frozenset({flag(f.name) for group in groups for f in dataclasses.fields(group)} | {"--config", "--help"})


@cache
def flags_of(command: str) -> frozenset[str]:
    if command == "pretrain":
        return pretrain_flags()
    own = frozenset(program.flags_of(completion.command_of(command)))
    return own | pretrain_flags() if command in HAND_ON else own


def command_of(match: re.Match[str]) -> str:
    """Returns the command that a program of the docs is; KeyError where there is none."""
    by_module = {module_of(name): name for name in COMMANDS}
    if match["tool"]:
        text = (ROOT / f"tools/{match['tool']}.py").read_text()
        return by_module[text.rpartition('run("')[2].partition('"')[0]]
    if match["module"]:
        return by_module[f"megatron_samoe.cli.{match['module']}"]
    assert match["command"] in COMMANDS, match[0]
    return match["command"]


def shown_commands(text: str) -> list[tuple[re.Match[str], str]]:
    """Returns (program, its arguments) of the code lines of a page; a backslash goes on in the next line."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line for line in joined.splitlines() if line.startswith("    ")]
    lines += re.findall(r"`([^`\n]+)`", joined)
    return [(match, line[match.end() :]) for line in lines if (match := PROGRAM.search(line))]


def test_commands_in_files_exist_with_their_flags() -> None:
    found = {str(path.relative_to(ROOT)): re.sub(r"(?m)^#", " ", path.read_text()) for path in FILES}
    shown = {name: shown_commands(text) for name, text in found.items()}
    for name, commands in shown.items():
        refuse_unknown(name, commands)
    assert {"examples/serve_nginx.conf", "examples/finetune/answers.py"} <= {
        name for name, some in shown.items() if some
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_exist_with_their_flags(page: Path) -> None:
    shown = shown_commands(page.read_text())
    refuse_unknown(page.name, shown)
    assert page != ROOT / "README.md" or len(shown) > 8


def refuse_unknown(place: str, commands: list[tuple[re.Match[str], str]]) -> None:
    for match, rest in commands:
        command = command_of(match)
        words = re.sub(r'"[^"]*"', "", rest)  # what is quoted is a value
        unknown = set(re.findall(r"(?<!\S)(--[a-z][a-z-]*)", words.split("#")[0].split("|")[0])) - flags_of(command)
        assert not unknown, f"{place}: {match[0]} ({command}) has no {unknown}: {rest}"


def test_the_command_after_a_conversion_and_surgery_exists_with_its_flags() -> None:
    shown = how_to_train_on(Path("made")).partition("\n")[2].strip()
    match = PROGRAM.match(shown)
    assert match and "..." not in shown
    refuse_unknown("the hint", [(match, shown[match.end() :])])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    folders = (ROOT, ROOT / "megatron_samoe", ROOT / "cpp_ext", page.parent)
    text = page.read_text()
    if page.name == "architecture.md":  # whose habits name files of other projects
        text = text.partition("## Habits")[0]
    named = set(re.findall(r"`((?:[a-z_]+/)+[\w-]+\.(?:py|h|cpp|cu|md|yaml|sh))\b(?!\w)`", text))
    named |= {link for link in re.findall(r"\]\(([\w/.-]+\.(?:md|py|png|json|html))[)#]", text)}
    missing = sorted(name for name in named if not any((folder / name).exists() for folder in folders))
    assert not missing, missing
