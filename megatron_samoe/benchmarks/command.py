"""Measures speed against limits, plain torch and other programs in the same run.

Each figure is a median over rounds in which all variants run in turn, so that other load on the machine meets them
alike. Only ratios of one run count: a column "a / b" is a's speed over b's. Every subcommand prints a table; --json keeps
the figures and the conditions of the run, --png draws the ratios.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

import torch

from megatron_samoe.benchmarks import all_to_all, decode, expert_parallel, layer, ops, roofline, train
from megatron_samoe.benchmarks.common import as_table, conditions, save
from megatron_samoe.errors import MegatronSamoeError
from megatron_samoe.ops import extension
from megatron_samoe.parallel_state import backend

PARTS = (layer, train, roofline, expert_parallel, all_to_all, ops, decode)
#: Those with a command line of their own.
PROGRAMS = ("checkpoint", "convert", "data", "parallel", "serve")


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for part in PARTS:
        part.add_parser(commands)
    for name in PROGRAMS:
        commands.add_parser(name, add_help=False, help=f"`{name} --help` tells its own options")
    return parser


def main() -> int:
    """Runs one benchmark, prints its table and returns the exit status."""
    if sys.argv[1:2] and sys.argv[1] in PROGRAMS:
        name, sys.argv = sys.argv[1], [f"{sys.argv[0]} {sys.argv[1]}", *sys.argv[2:]]
        status: int = importlib.import_module(f"megatron_samoe.benchmarks.{name}").main()
        return status
    options = make_parser().parse_args()
    switch = extension.ENVIRONMENT_VARIABLE
    if os.environ.get(switch) != "off" and not extension.available():  # which says why
        print(f"error: this would time the slower torch ops; {switch}=off says that you mean to.", file=sys.stderr)
        return 2
    backend.keep_freed_memory()
    backend.set_num_threads(getattr(options, "threads", 1))
    torch.manual_seed(1)
    found = conditions(options)
    try:
        rows = options.run(options)
        # The decoding benchmark writes files of its own form.
        if options.command != "decode":
            save(options, rows, found)
    except MegatronSamoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{found['threads']} threads, torch {found['torch']}, extension {found['extension']}, {found['cpu']}\n")
    print(as_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
