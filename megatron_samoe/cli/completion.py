"""Prints a script that completes `megatron-samoe` in a shell: `eval "$(megatron-samoe completion bash)"`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, make_dataclass
from typing import Annotated, Any, Literal, Union

import tyro

from megatron_samoe.cli.command import COMMANDS, module_of
from megatron_samoe.cli.program import Commands, Group, program, summary
from megatron_samoe.config.pretrain import PretrainConfig


def command_of(name: str) -> Commands:
    """Returns what a command reads."""
    if name == "pretrain":  # whose options may be in a file, too
        return PretrainConfig
    found: Commands = importlib.import_module(module_of(name)).main.command
    return found


def _any_of(commands: Mapping[str, Commands]) -> Any:
    """Returns the type of which tyro makes one of several commands."""
    found = []
    for name, one in commands.items():
        kind: Any = one
        if not isinstance(one, type):
            group = one if isinstance(one, Group) else one()
            kind = make_dataclass(name.replace("-", "_"), [("chosen", _any_of(group.commands))])
        if one is not PretrainConfig:  # each of whose switches has an opposite
            kind = Annotated[kind, tyro.conf.FlagCreatePairsOff]
        found.append(Annotated[kind, tyro.conf.subcommand(name, description=summary(one))])
    return Union[tuple(found)]  # noqa: UP007


@dataclass(frozen=True)
class Completion:
    """Prints a script by which a shell completes megatron-samoe."""

    shell: Annotated[tyro.conf.Positional[Literal["bash", "zsh", "tcsh", "fish"]], tyro.conf.arg(metavar="SHELL")]

    def run(self) -> None:
        commands = _any_of({name: command_of(name) for name in COMMANDS})
        words = ["--tyro-print-completion", self.shell]
        forms = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
        tyro.cli(commands, args=words, prog="megatron-samoe", config=forms)


main = program(Completion)

if __name__ == "__main__":
    sys.exit(main())
