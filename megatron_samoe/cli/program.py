"""Programs as dataclasses: a field is a flag, the docstring below it the flag's help, and `run` what the program does."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import dropwhile, takewhile
from typing import Any, NoReturn, Protocol, get_type_hints

import tyro

from megatron_samoe.errors import DataError, MegatronSamoeError, nearest


class Command(Protocol):
    """What a command line says, by its fields."""

    def run(self) -> int | None:
        """Does it, and returns the exit status; None is 0."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Commands, by the word that chooses among them.

    Attributes:
        text: what --help says above their list.
        elsewhere: what is said of a word that is none of them, in place of their list.
    """

    commands: Mapping[str, Commands]
    text: str = ""
    elsewhere: str = ""


#: A class of commands, or several; a function finds out which there are.
Commands = type[Any] | Group | Callable[[], Group]
#: The words of a command line; those of this process if not given.
Words = Sequence[str] | None
#: Groups of fields give their flags no prefix, a switch has no opposite, and only a default is None.
FORMS = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
#: Before a word that is a value although it begins with a dash.
_VALUE = "\0"
_NUMBERS = {int: "a whole number", float: "a number"}


def _value_rules() -> tyro.constructors.ConstructorRegistry:
    """Returns how tyro is to read texts and numbers."""
    registry = tyro.constructors.ConstructorRegistry()

    def read(kind: type, words: list[str]) -> Any:
        text = words[0].removeprefix(_VALUE)
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"{text!r} is not {_NUMBERS[kind]}") from None

    @registry.primitive_rule
    def value(info: Any) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
        kind = info.type
        if kind not in (str, *_NUMBERS):
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=kind.__name__.upper(),
            instance_from_str=functools.partial(read, kind),
            is_instance=lambda value: isinstance(value, (kind, int) if kind is float else kind),
            str_from_instance=lambda value: [f"{value:g}" if kind is float else str(value)],
        )

    return registry


def read(command: Commands, words: Words = None, prog: str | None = None) -> Any:
    """Returns the command that words describe.

    Args:
        prog: how messages call the program.

    Raises:
        SystemExit: help was asked for, or a flag or value is wrong, which one sentence on standard error says.
    """
    words, prog = list(sys.argv[1:] if words is None else words), prog or os.path.basename(sys.argv[0])
    if isinstance(command, type):
        return read_known(command, words, prog)[0]
    group = command if isinstance(command, Group) else command()
    name, rest = (words or [""])[0], words[1:]
    if name in ("-h", "--help"):
        print(usage(prog, {name: summary(one) for name, one in group.commands.items()}, group.text))
        raise SystemExit(0)
    if name not in group.commands:
        told = f"{name} is not known.{nearest(name, group.commands)}" if name else "a command is missing."
        _refuse(prog, f"{told} {group.elsewhere or 'There are ' + ', '.join(group.commands) + '.'}")
    return read(group.commands[name], rest, f"{prog} {name}")


def read_known(command: type[Any], words: Sequence[str], prog: str, others: bool = False) -> tuple[Any, list[str]]:
    """Returns the command, and the words that it does not know, where there may be `others`."""
    flags = {flag: field for flag, field in flags_of(command)}
    named = [name for word in words if (name := word.split("=")[0].replace("_", "-")).startswith("--")]
    for name in named:
        # Before tyro, which would first miss the flag that the misspelt one was meant to be.
        if not (others or name in flags or name in ("--", "--help") or " " in name):
            _refuse(prog, f"{name} is not known.{nearest(name, flags)}")
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            found: tuple[Any, list[str]] = tyro.cli(
                command,
                args=[_VALUE + word if word.startswith("-") and " " in word else word for word in words],
                prog=prog,
                return_unknown_args=True,
                config=FORMS,
                registry=_value_rules(),
            )
    except SystemExit as end:
        if end.code:
            _refuse(prog, _sentence(box.getvalue(), prog))
        raise
    if found[1] and not others:
        _refuse(prog, f"{' '.join(found[1])} has no meaning here.")
    for name, field in flags.items():
        if getattr(found[0], field, None) == () and name in named:
            _refuse(prog, f"{name} needs a value.")
    return found


def flags_of(command: type[Any]) -> Iterator[tuple[str, str]]:
    """Yields the flags of a command with the names of their fields, those of groups of fields too."""
    hints = get_type_hints(command)
    for field in dataclasses.fields(command):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from flags_of(hints[field.name])
        else:
            yield f"--{field.name.replace('_', '-')}", field.name


def summary(command: Commands) -> str:
    """Returns the first line of what a command says of itself, for a list of commands."""
    text = command.text if isinstance(command, Group) else command.__doc__
    return (text or "").strip().partition("\n")[0]


def usage(prog: str, commands: Mapping[str, str], text: str = "") -> str:
    """Returns what --help prints of several commands, given what each does."""
    width = max(map(len, commands))
    lines = "\n".join(f"  {name:{width}}  {what}" for name, what in commands.items())
    above = f"{text.strip()}\n\n" if text else ""
    return f"usage: {prog} COMMAND ...\n\n{above}{lines}\n\n{prog} COMMAND --help tells about each."


def _sentence(box: str, prog: str) -> str:
    """Returns what tyro says of a mistake in a box, or between rules where the terminal draws none, as one sentence."""
    _, *lines = (re.sub("[-─]{3,}", "---", line.strip("│╭╮╰╯ ")) for line in box.splitlines())
    told = " ".join(
        " ".join(takewhile(lambda line: line != "---", dropwhile(lambda line: line == "---", lines))).split()
    )
    told = re.sub(r"no type matching .* Got errors: - <class '\w+'>: ", "", told.removeprefix("Error parsing "))
    return told.replace(f"Missing from {prog}:", "needs")


def _refuse(prog: str, message: str) -> NoReturn:
    print(f"{prog}: {message}", file=sys.stderr)
    raise SystemExit(2)


class Program(Protocol):
    """A module's `main`: runs a command and returns its exit status."""

    command: Commands

    def __call__(self, words: Words = None) -> int: ...


def program(command: Commands) -> Program:
    """Returns the main of a command: an error for the user is one paragraph on standard error."""

    def main(words: Words = None) -> int:
        try:
            return read(command, words).run() or 0
        except MegatronSamoeError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_status
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            return 141
        except OSError as error:
            print(f"error: {DataError(str(error))}", file=sys.stderr)
            return 1

    main.command = command  # type: ignore[attr-defined]
    return main  # type: ignore[return-value]
