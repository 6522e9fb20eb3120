"""What command lines share: options in one line each, refusal of unknown flags, and one way to end with an error."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from megatron_samoe.errors import DataError, MegatronSamoeError, nearest

#: What a command line says, by the names of its options.
Options = argparse.Namespace
#: The words of a command line; those of this process if not given.
Words = Sequence[str] | None


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, that names the nearest flag for an unknown one."""

    def __init__(self, description: str, **options: Any):
        options = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False, **options}
        super().__init__(description=description, **options)

    def parse_args(self, args: Words = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        flags = _all_flags(self)
        for word in words:
            name = word.split("=")[0]
            # Before argparse, which would first complain of the flag that the misspelt one was meant to be.
            if name.startswith("--") and name != "--" and name not in flags:
                self.error(f"{name} is not known.{nearest(name, flags)}")
        return super().parse_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def text_parser(text: str | None, **options: Any) -> argparse.ArgumentParser:
    """Returns a parser whose help shows a text as it is written, and that knows no abbreviations."""
    return argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
    )


def adder(group: argparse._ActionsContainer) -> Callable[..., argparse.Action]:
    """Returns a function that adds an option: its name, what it takes, and what --help says of it.

    It takes a type (bool is a switch), a default (of whose type values are), choices as a tuple (the first is the default
    of an option that is not required), or a list of one of these for several values. Whatever else argparse knows goes by
    its name there.
    """

    def add(name: str, takes: Any = str, text: str | None = None, **more: Any) -> argparse.Action:
        facts: dict[str, Any] = {}
        one = takes
        if isinstance(takes, list):
            one = takes[0] if takes else str
            facts["nargs"] = "+"
        if isinstance(one, tuple):
            facts["choices"] = one
            if one is takes and not more.get("required"):
                facts["default"] = one[0]
        elif not isinstance(one, type) or takes == []:
            facts["default"] = takes
        if one is bool:
            facts["action"] = "store_true"
        else:
            facts["type"] = one if isinstance(one, type) else type(one[0] if isinstance(one, tuple) else one)
        return group.add_argument(name, help=text, **{**facts, **more})

    return add


def _all_flags(parser: argparse.ArgumentParser) -> list[str]:
    """Returns the flags of a parser and of its sub-commands."""
    flags: list[str] = []
    for action in parser._actions:
        flags.extend(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                flags.extend(_all_flags(command))
    return flags


def program(command: Callable[[Words], int | None]) -> Callable[..., int]:
    """Returns a program's main: it gives the exit status; an error for the user is one paragraph on standard error."""

    @functools.wraps(command)
    def main(words: Words = None) -> int:
        try:
            return command(words) or 0
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

    return main
