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
from pathlib import Path
from typing import Annotated, Any, NoReturn, Protocol

import tyro

from megatron_samoe.cli.command import usage
from megatron_samoe.errors import DataError, MegatronSamoeError, nearest
from megatron_samoe.plain_help import plain_help


@dataclasses.dataclass(frozen=True)
class Group:
    """Commands, by the word that chooses among them.

    Attributes:
        text: what --help says above their list.
        elsewhere: the message for any other word; their list if empty.
    """

    commands: Mapping[str, Commands]
    text: str = ""
    elsewhere: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HandsOn:
    """A command that hands on the words that it does not know: flags of pretraining."""

    others: tyro.conf.Suppress[tuple[str, ...]] = ()


#: A class of commands, or several; a function finds out which there are.
Commands = type[Any] | Group | Callable[[], Group]
#: The words of a command line; those of this process if not given.
Words = Sequence[str] | None
#: Groups of fields give their flags no prefix, a switch has no opposite, and only a default is None.
FORMS = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
#: Types of options whose help shows N.
Number = Annotated[int, tyro.conf.arg(metavar="N")]
Count = Annotated[int | None, tyro.conf.arg(metavar="N")]
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
        if kind not in (str, Path, *_NUMBERS):
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
        return _read_one(command, words, prog)
    group = command if isinstance(command, Group) else command()
    name, rest = (words or [""])[0], words[1:]
    if name in ("-h", "--help"):
        print(usage(prog, {name: summary(one) for name, one in group.commands.items()}, group.text))
        raise SystemExit(0)
    if name not in group.commands:
        told = f"{name} is not known.{nearest(name, (*group.commands, '--help'))}" if name else "a command is missing."
        _refuse(prog, f"{told} {group.elsewhere or 'There are ' + ', '.join(group.commands) + '.'}")
    return read(group.commands[name], rest, f"{prog} {name}")


def _read_one(command: type[Any], words: Sequence[str], prog: str) -> Any:
    if {"-h", "--help"} & set(words):
        print(_help(command, prog))
        raise SystemExit(0)
    hands_on = issubclass(command, HandsOn)
    asked = f" {' '.join(words).replace('=', ' ')} "
    for former, way_on in getattr(command, "FORMER", {}).items():  # words of earlier versions
        if f" {former} " in asked:
            _refuse(prog, f"{former}: {way_on}.")
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            found, others = tyro.cli(
                command,
                args=[_VALUE + word if word.startswith("-") and " " in word else word for word in words],
                prog=prog,
                return_unknown_args=True,
                config=FORMS,
                registry=_value_rules(),
            )
    except SystemExit as end:
        if end.code:
            _refuse(prog, "" if hands_on else _misspelt(command, words), _sentence(box.getvalue(), prog))
        raise
    if hands_on:
        return dataclasses.replace(found, others=tuple(word.removeprefix(_VALUE) for word in others))
    if others:
        _refuse(prog, _misspelt(command, others), f"{' '.join(others)} has no meaning here.")
    named = {word.split("=")[0].replace("_", "-") for word in words}
    for flag in _empty(found):
        if flag in named:
            _refuse(prog, f"{flag} needs a value.")
    return found


def _misspelt(command: type[Any], words: Sequence[str]) -> str:
    """Returns a sentence about the first unknown flag, which is worth more than tyro's message on what is missing."""
    flags = flags_of(command)
    for word in words:
        name = word.split("=")[0].replace("_", "-")
        if name.startswith("--") and " " not in name and name not in flags:
            return f"{name} is not known.{nearest(name, flags)}"
    return ""


def _empty(found: Any) -> Iterator[str]:
    """Yields the flags of options that take several values and have none."""
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        if value == ():
            yield f"--{field.name.replace('_', '-')}"
        elif dataclasses.is_dataclass(value):
            yield from _empty(value)


def flags_of(command: Commands) -> set[str]:
    """Returns the flags that --help shows, of all commands of a group."""
    if not isinstance(command, type):
        group = command if isinstance(command, Group) else command()
        return {flag for one in group.commands.values() for flag in flags_of(one)}
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", _help(command)))


def _help(command: type[Any], prog: str | None = None) -> str:
    """Returns what --help shows."""
    return plain_help(functools.partial(tyro.cli, command, prog=prog, config=FORMS, registry=_value_rules()))


def summary(command: Commands) -> str:
    """Returns the first line of what a command says of itself, for a list of commands."""
    text = command.text if isinstance(command, Group) else command.__doc__
    return (text or "").strip().partition("\n")[0]


def _sentence(box: str, prog: str) -> str:
    """Returns what tyro says of a mistake in a box, or between rules where the terminal draws none, as one sentence."""
    _, *lines = (re.sub("[-─]{3,}", "---", line.strip("│╭╮╰╯ ")) for line in box.splitlines())
    body = takewhile(lambda line: line != "---", dropwhile(lambda line: line == "---", lines))
    told = " ".join(" ".join(body).split())
    told = re.sub(r"no type matching .* Got errors: - <class '\w+'>: ", "", told.removeprefix("Error parsing "))
    return told.replace(f"Missing from {prog}:", "needs")


def _refuse(prog: str, *messages: str) -> NoReturn:
    """Ends with the first message that says something."""
    print(f"{prog}: {next(filter(None, messages))}", file=sys.stderr)
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

    return main_of(command, main)


def main_of(command: Commands, main: Callable[..., int]) -> Program:
    """Returns a main that knows what it reads."""
    main.command = command  # type: ignore[attr-defined]
    return main  # type: ignore[return-value]
