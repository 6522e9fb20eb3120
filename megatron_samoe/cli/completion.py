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
from megatron_samoe.config.pretrain import PretrainConfig


def whole_parser() -> argparse.ArgumentParser:
    """Returns one parser that knows the flags of every command."""
    parser = argparse.ArgumentParser(prog="megatron-samoe")
    commands = parser.add_subparsers(dest="command")
    own: Any
    for name, (_, what) in COMMANDS.items():
        if name == "pretrain":
            own = tyro.extras.get_parser(PretrainConfig, config=(tyro.conf.OmitArgPrefixes,))
        else:
            own = importlib.import_module(module_of(name)).make_parser()
        commands.add_parser(name, help=what, parents=[own], add_help=False, conflict_handler="resolve")
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
