"""Small helpers for the command lines of the data tools: unknown flags are refused with the nearest known one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from megatron_samoe.errors import DataError, MegatronSamoeError, nearest


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, that names the nearest flag for an unknown one."""

    def __init__(self, description: str, **options: object):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            **options,  # type: ignore[arg-type]
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: object = None) -> argparse.Namespace:  # type: ignore
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


def _all_flags(parser: argparse.ArgumentParser) -> list[str]:
    """Returns the flags of a parser and of its sub-commands."""
    flags = []
    for action in parser._actions:
        flags.extend(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                flags.extend(_all_flags(command))
    return flags


def add_tokenizer_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds Megatron's flags that name a tokenizer."""
    from megatron_samoe.datasets.tokenizer import TOKENIZER_TYPES

    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-type", required=required, choices=TOKENIZER_TYPES, help="kind of tokenizer")
    group.add_argument("--tokenizer-model", help="SentencePiece .model, or tokenizer.json")
    group.add_argument("--vocab-file", help="GPT-2 vocabulary (JSON)")
    group.add_argument("--merge-file", help="GPT-2 merges")


def run(command: Callable[[Sequence[str] | None], None], arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status; an error for the user is one paragraph on standard error."""
    try:
        command(arguments)
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
    return 0
