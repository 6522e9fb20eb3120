"""Prints a script that completes `megatron-samoe` in a shell: `eval "$(megatron-samoe completion bash)"`."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

import shtab
import tyro

from megatron_samoe.cli.arguments import Parser, Words, adder, program
from megatron_samoe.cli.command import COMMANDS, module_of
from megatron_samoe.cli.program import FORMS, Group, summary
from megatron_samoe.config.pretrain import PretrainConfig


def whole_parser() -> argparse.ArgumentParser:
    """Returns one parser that knows the flags of every command."""
    parser = argparse.ArgumentParser(prog="megatron-samoe")
    commands = parser.add_subparsers(dest="command")
    for name, (_, what) in COMMANDS.items():
        own = parser_of(importlib.import_module(module_of(name)))
        commands.add_parser(name, help=what, parents=[own], add_help=False, conflict_handler="resolve")
    return parser


def parser_of(module: Any) -> argparse.ArgumentParser:
    """Returns a parser that knows the flags of a command's module."""
    if module.__name__.endswith(".pretrain"):
        return _parser(PretrainConfig)
    return _parser(module.main.command) if hasattr(module.main, "command") else module.make_parser()


def _parser(command: Any) -> argparse.ArgumentParser:
    if isinstance(command, type):
        made: Any = tyro.extras.get_parser(command, config=FORMS)
        return made  # type: ignore[no-any-return]
    group = command if isinstance(command, Group) else command()
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for name, one in group.commands.items():
        commands.add_parser(name, help=summary(one), parents=[_parser(one)], add_help=False, conflict_handler="resolve")
    return parser


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = Parser("Prints a script that completes megatron-samoe in a shell.")
    adder(parser)("shell", tuple(shtab.SUPPORTED_SHELLS), default=None)
    return parser


@program
def main(words: Words) -> None:
    """Runs the command and returns its exit status."""
    print(shtab.complete(whole_parser(), make_parser().parse_args(words).shell))


if __name__ == "__main__":
    sys.exit(main())
