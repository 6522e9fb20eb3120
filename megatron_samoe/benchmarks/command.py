"""Measures speed against limits, plain torch and other programs in the same run.

Each figure is a median over rounds in which all variants run in turn, so that other load on the machine meets them
alike. Only ratios of one run count: a column "a / b" is a's speed over b's. Every subcommand prints a table; --json keeps
the figures and the conditions of the run, --png draws the ratios.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

from megatron_samoe.benchmarks import (
    all_to_all,
    checkpoint,
    convert,
    data,
    decode,
    expert_parallel,
    gpu_budget,
    layer,
    muon,
    ops,
    parallel,
    ring_attention,
    roofline,
    serve,
    servers,
    train,
)
from megatron_samoe.benchmarks.common import as_table, conditions, save
from megatron_samoe.benchmarks.gpu_check import command as gpu_check
from megatron_samoe.cli.arguments import Words, program, text_parser
from megatron_samoe.ops import extension
from megatron_samoe.parallel_state import backend

PARTS = (
    layer,
    train,
    roofline,
    expert_parallel,
    all_to_all,
    ops,
    muon,
    decode,
    checkpoint,
    convert,
    data,
    parallel,
    serve,
    servers,
    ring_attention,
    gpu_budget,
    gpu_check,
)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = text_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for part in PARTS:
        part.add_parser(commands)
    return parser


@program
def main(words: Words) -> int:
    """Runs one benchmark, prints its table and returns the exit status."""
    options = make_parser().parse_args(words)
    if options.is_alone:
        return int(options.run(options) or 0)
    switch = extension.ENVIRONMENT_VARIABLE
    if os.environ.get(switch) != "off" and not extension.available():  # which says why
        print(f"error: this would time the slower torch ops; {switch}=off says that you mean to.", file=sys.stderr)
        return 2
    backend.keep_freed_memory()
    backend.set_num_threads(getattr(options, "threads", 1))
    torch.manual_seed(1)
    found = conditions(options)
    rows = options.run(options)
    # The decoding benchmark writes files of its own form.
    if options.command != "decode":
        save(options, rows, found)
    print(f"{found['threads']} threads, torch {found['torch']}, extension {found['extension']}, {found['cpu']}\n")
    print(as_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
