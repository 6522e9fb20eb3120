"""Prints a script that completes `megatron-samoe` in a shell: `eval "$(megatron-samoe completion bash)"`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import shtab
import tyro

from megatron_samoe.cli.arguments import Parser
from megatron_samoe.cli.command import COMMANDS, module_of
from megatron_samoe.config.pretrain import PretrainConfig


def whole_parser() -> argparse.ArgumentParser:
    """Returns one parser that knows the flags of every command."""
    parser = argparse.ArgumentParser(prog="megatron-samoe")
    commands = parser.add_subparsers(dest="command")
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
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit status."""
    options = make_parser().parse_args(argv)
    print(shtab.complete(whole_parser(), options.shell))
    return 0


if __name__ == "__main__":
    sys.exit(main())
